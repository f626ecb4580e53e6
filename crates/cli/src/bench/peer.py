"""Times llama.cpp through its C API. Arguments: GGUF file, threads, tokens of a prefill chunk.

Reads a JSON object a line: {"kv", "depth", "seconds", "prefill"}; answers with one. A depth is reached by computing up to
1,024 tokens once and restoring that state again and again into further cells of the same sequence: attention costs the same
as after a real prefill.
"""
import json
import sys
import time

try:
    import llama_cpp as L
except Exception as e:
    print("import failed:", e, flush=True)
    sys.exit()

FILE, THREADS, CHUNK = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
SEED = 1024

quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, None)
L.llama_backend_init()
model = L.llama_model_load_from_file(FILE.encode(), L.llama_model_default_params())
if not model:
    print("cannot load", FILE, flush=True)
    sys.exit()
vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))


def decode(ctx, n, position, logits=True):
    """Runs n tokens from a position on; seconds."""
    batch = L.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i in range(n):
        batch.token[i] = (position + i) * 7919 % (vocab - 1000) + 500
        batch.pos[i] = position + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = 1 if logits and i == n - 1 else 0
    start = time.perf_counter()
    status = L.llama_decode(ctx, batch)
    if logits:
        L.llama_synchronize(ctx)
    seconds = time.perf_counter() - start
    L.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")
    return seconds


def measure(kv, depth, seconds, prefill):
    params = L.llama_context_default_params()
    params.n_ctx = (depth + CHUNK + 511) // 256 * 256
    params.n_batch = params.n_ubatch = max(CHUNK, 512)
    params.n_threads = params.n_threads_batch = THREADS
    params.type_k = params.type_v = TYPES[kv]
    params.flash_attn_type = 1
    params.n_seq_max = 2
    params.kv_unified = True
    params.no_perf = True
    ctx = L.llama_init_from_model(model, params)
    if not ctx:
        raise RuntimeError("no context")
    try:
        memory = L.llama_get_memory(ctx)
        seed = min(depth, SEED)
        for at in range(0, seed, 512):
            decode(ctx, min(512, seed - at), at, logits=False)
        if depth > seed:
            size = L.llama_state_seq_get_size(ctx, 0)
            state = (L.ctypes.c_uint8 * size)()
            L.llama_state_seq_get_data(ctx, state, size, 0)
            for _ in range(depth // seed - 1):
                if not L.llama_state_seq_set_data(ctx, state, size, 1):
                    raise RuntimeError("cannot restore a state")
                L.llama_memory_seq_cp(memory, 1, 0, -1, -1)
                L.llama_memory_seq_rm(memory, 1, -1, -1)
        times, start = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - start < seconds:
            times.append(decode(ctx, 1, seed))
            L.llama_memory_seq_rm(memory, 0, seed, -1)
        speed = None
        if prefill:
            speed = CHUNK / decode(ctx, CHUNK, seed)
        block, size = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20),
                       "q5_0": (32, 22), "q5_1": (32, 24)}[kv]
        head = L.llama_model_n_embd(model) // L.llama_model_n_head(model)
        elements = 2 * L.llama_model_n_layer(model) * L.llama_model_n_head_kv(model) * head * depth
        times.sort()
        return {"kv": kv, "depth": depth, "decode_tok_s": 1 / times[len(times) // 2], "prefill_tok_s": speed,
                "cache_bytes": elements // block * size}
    finally:
        L.llama_free(ctx)


print("ready", flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(measure(**json.loads(line))), flush=True)
    except Exception as e:
        print("failed:", e, flush=True)
