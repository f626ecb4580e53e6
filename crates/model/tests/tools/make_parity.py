"""Makes fixtures/parity/NAME: a tiny model with random weights as `transformers` runs it, and what it computes.

usage: make_parity.py   (needs torch, transformers, gguf; made with transformers 5.23, torch 2.15)

    model/                 a Hugging Face folder, sharded; config.old.json is the configuration as older versions wrote it
    model.gguf             the same weights, laid out as converters do
    reference.safetensors  ids, positions; logits, and keys (before the rotation) and values of every layer there;
                           short.safetensors: of a text that is short enough for another scaling

Weights are rounded so that every layout holds the same numbers.
"""
import json
import pathlib
import shutil

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

OUT = pathlib.Path(__file__).parent.parent / "fixtures" / "parity"
POSITIONS = [0, 1, 15, 16, 23, 24, 40, 63, 64, 90, 99]
BASE = dict(
    vocab_size=48, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)
SHORT, LONG = [1.0, 1.5], [1.2, 6.0]
# name: (configuration class, changes, dtype, tokens, old form of the rope keys)
CASES = {
    "llama": ("Llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)), "bfloat16", 100,
              dict(rope_theta=100.0, rope_scaling=dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64))),
    "llama-linear": ("Llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=2.0)), "float32", 100,
                     dict(rope_theta=1000.0, rope_scaling=dict(type="linear", factor=2.0))),
    "llama-dynamic": ("Llama", dict(max_position_embeddings=64, rope_parameters=dict(rope_type="dynamic", rope_theta=1000.0, factor=4.0)), "float16", 100,
                      dict(rope_theta=1000.0, rope_scaling=dict(type="dynamic", factor=4.0))),
    "mistral": ("Mistral", dict(sliding_window=24, rope_parameters=dict(rope_type="default", rope_theta=1000.0)), "bfloat16", 100, dict(rope_theta=1000.0)),
    "qwen2": ("Qwen2", dict(max_position_embeddings=128, rope_parameters=dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32)), "bfloat16", 100,
              dict(rope_theta=1000.0, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32))),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=40, max_window_layers=1, rope_parameters=dict(rope_type="default", rope_theta=1000.0)), "float32", 100, dict(rope_theta=1000.0)),
    "qwen3": ("Qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=1000.0)), "float16", 100, dict(rope_theta=1000.0)),
    "gemma3": ("Gemma3Text", dict(num_hidden_layers=3, head_dim=16, sliding_window=16, query_pre_attn_scalar=16, final_logit_softcapping=5.0, tie_word_embeddings=True,
                              layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                              rope_parameters=dict(full_attention=dict(rope_type="linear", rope_theta=2000.0, factor=8.0), sliding_attention=dict(rope_type="default", rope_theta=100.0))), "bfloat16", 100,
               dict(rope_theta=2000.0, rope_local_base_freq=100.0, rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window_pattern=2)),
    "phi3": ("Phi3", dict(max_position_embeddings=128, original_max_position_embeddings=64, sliding_window=50, rope_parameters=dict(rope_type="longrope", rope_theta=1000.0, partial_rotary_factor=0.5, short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=64)), "bfloat16", 100,
             dict(rope_theta=1000.0, partial_rotary_factor=0.5, original_max_position_embeddings=64, rope_scaling=dict(type="longrope", short_factor=SHORT, long_factor=LONG))),
}
# The same model on a text that is not longer than those that it was trained with first.
CASES["phi3-short"] = (*CASES["phi3"][:3], 60, None)
CASES["gemma3-scaled"] = ("Gemma3Text", CASES["gemma3"][1] | dict(num_hidden_layers=1, layer_types=["full_attention"], query_pre_attn_scalar=40), "float32", 100,
                          CASES["gemma3"][4] | dict(sliding_window_pattern=1))
# What GGUF has no keys for.
FOLDER_ONLY = ["llama-dynamic", "qwen2-window", "gemma3-scaled"]
DTYPES = {"bfloat16": gguf.GGMLQuantizationType.BF16, "float16": gguf.GGMLQuantizationType.F16, "float32": gguf.GGMLQuantizationType.F32}


def make(name, kind, changes, dtype, tokens, old):
    short = name.endswith("-short")
    name = name.removesuffix("-short")
    torch.manual_seed(sum(map(ord, name)))
    settings = {**BASE, **changes}
    if kind == "Phi3":
        settings["hidden_size"] = 32
        del settings["head_dim"]
    config = getattr(transformers, kind + "Config")(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for n, p in model.named_parameters():
        if "norm" in n:
            p.data = 0.3 * torch.randn_like(p) + (0.0 if kind.startswith("Gemma") else 1.0)
        elif n.endswith("bias"):
            p.data = torch.randn_like(p) * (2.0 if "k_proj" in n else 0.5)
        else:
            p.data = torch.randn_like(p) * (1.0 if "embed" in n else 1.5 / p.shape[-1] ** 0.5)
        # Representable in all three types, but for a few that stay as they round in each.
        p.data = p.data.bfloat16().half().float()

    ids = torch.randint(0, config.vocab_size, (1, tokens))
    seen = {}

    def catch(key, part=None):
        def hook(_, __, out):
            seen[key] = (out if part is None else out[..., part])[0].detach().reshape(tokens, config.num_key_value_heads, -1)
        return hook

    for i, layer in enumerate(model.model.layers):
        a = layer.self_attn
        d = a.head_dim
        if kind == "Phi3":
            q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
            a.qkv_proj.register_forward_hook(catch(f"keys.{i}", slice(q, q + kv)))
            a.qkv_proj.register_forward_hook(catch(f"values.{i}", slice(q + kv, q + 2 * kv)))
        else:
            if hasattr(a, "k_norm"):
                # Heads come before or after tokens, depending on the version.
                def hook(_, __, out, i=i):
                    out = out[0].detach()
                    seen[f"keys.{i}"] = out if out.shape[0] == tokens else out.transpose(0, 1)
                a.k_norm.register_forward_hook(hook)
            else:
                a.k_proj.register_forward_hook(catch(f"keys.{i}"))
            a.v_proj.register_forward_hook(catch(f"values.{i}"))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0]
    at = [p for p in POSITIONS if p < tokens]
    out = OUT / name
    if not short:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    reference = {"ids": ids[0].to(torch.int32), "positions": torch.tensor(at, dtype=torch.int32), "logits": logits[at].contiguous()}
    reference |= {k: v[at].contiguous() for k, v in seen.items()}
    save_file(reference, out / ("short.safetensors" if short else "reference.safetensors"))
    print(name, "logits", float(logits.std()), "keys", {k: round(float(v.std()), 2) for k, v in seen.items()})

    weights = {n: p.data.numpy() for n, p in model.state_dict().items()}
    if not short:
        model.to(getattr(torch, dtype)).save_pretrained(out / "model", max_shard_size="16KB")
        (out / "model" / "generation_config.json").unlink(missing_ok=True)
        stated = json.loads((out / "model" / "config.json").read_text())
        for key in ("transformers_version", "_name_or_path", "use_cache"):
            stated.pop(key, None)
        (out / "model" / "config.json").write_text(json.dumps(stated, indent=1) + "\n")
        for key in ("rope_parameters", "layer_types", "partial_rotary_factor", "dtype"):
            stated.pop(key, None)
        (out / "model" / "config.old.json").write_text(json.dumps(stated | old, indent=1) + "\n")
        if name not in FOLDER_ONLY:
            write_gguf(out / "model.gguf", kind, config, weights, dtype)


def write_gguf(path, kind, config, weights, dtype):
    arch = {"Llama": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma3Text": "gemma3", "Phi3": "phi3"}[kind]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    w = gguf.GGUFWriter(path, arch)
    w.add_name("parity")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    w.add_rope_freq_base(rope["rope_theta"])
    dims = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    w.add_rope_dimension_count(dims)
    extra = {}
    if rope["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        w.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        trained = config.original_max_position_embeddings
        w.add_rope_scaling_orig_ctx_len(trained)
        scale = config.max_position_embeddings / trained
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(trained))))
        extra = {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
    if rope["rope_type"] == "llama3":
        freqs = rope["rope_theta"] ** (-np.arange(0, dims, 2) / dims)
        low, high = rope["original_max_position_embeddings"] / rope["low_freq_factor"], rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        factors = []
        for f in freqs:
            wave = 2 * np.pi / f
            smooth = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1.0 if wave < high else rope["factor"] if wave > low else 1 / ((1 - smooth) / rope["factor"] + smooth))
        extra = {"rope_freqs.weight": factors}
    if getattr(config, "sliding_window", None) and arch != "qwen2":
        w.add_sliding_window(config.sliding_window)
    if arch == "gemma3":
        w.add_uint32("gemma3.attention.sliding_window_pattern", 2)
        w.add_float32("gemma3.rope.freq_base_swa", config.rope_parameters["sliding_attention"]["rope_theta"])
        w.add_final_logit_softcapping(config.final_logit_softcapping)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, data in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = data.astype(np.float32)
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if arch == "gemma3" and name.endswith("norm.weight"):
            data = data + 1.0
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        put(w, target, data, DTYPES[dtype] if data.ndim > 1 else gguf.GGMLQuantizationType.F32)
    for name, factors in extra.items():
        put(w, name, np.array(factors, dtype=np.float32), gguf.GGMLQuantizationType.F32)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def put(w, name, data, dtype):
    w.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), dtype), raw_dtype=dtype)


for name, case in CASES.items():
    make(name, *case)
