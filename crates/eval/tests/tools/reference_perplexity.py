"""Perplexity of a GGUF model by an independent implementation, on the windows that `kvquant eval` takes.

usage: reference_perplexity.py MODEL.gguf TEXT [WINDOWS] [CTX]   (needs llama-cpp-python, gguf, numpy)

The weights are dequantized to F32 first: that implementation rounds activations to 8 bits before it multiplies them with
quantized weights, which this program never does.

Windows of CTX tokens from the start of the text; where the model expects a beginning-of-text token, it takes the place of
the first. Every position but the last predicts the next token. The cache is fp16.
"""
import pathlib
import sys
import tempfile
import unicodedata

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from llama_cpp import Llama



def widen(path, to):
    source = GGUFReader(path)
    writer = GGUFWriter(to, source.fields["general.architecture"].contents())
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for t in source.tensors:
        writer.add_tensor(t.name, dequantize(t.data, t.tensor_type).astype(np.float32).reshape(t.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


path, text = sys.argv[1:3]
folder = tempfile.TemporaryDirectory()
wide = pathlib.Path(folder.name) / "wide.gguf"
widen(path, wide)
windows, ctx = int(sys.argv[3]) if len(sys.argv) > 3 else 2, int(sys.argv[4]) if len(sys.argv) > 4 else 1024
model = Llama(str(wide), n_ctx=ctx, n_batch=512, logits_all=True, flash_attn=False, verbose=False, n_threads=2)
text = open(text, encoding="utf-8", newline="").read()[: windows * ctx * 12]
if "qwen" in model.metadata["general.architecture"]:
    # As that model's own tokenizer does.
    text = unicodedata.normalize("NFC", text)
ids = model.tokenize(text.encode(), add_bos=False, special=False)
bos = model.token_bos() if model.metadata.get("tokenizer.ggml.add_bos_token") == "true" else None
nll = []
for w in range(windows):
    window = list(ids[w * ctx : (w + 1) * ctx])
    if bos is not None:
        window[0] = bos
    model.reset()
    model.eval(window)
    logits = model.scores[:ctx].astype(np.float64)
    for row, after in zip(logits[:-1], window[1:]):
        top = row.max()
        nll.append(top + np.log(np.exp(row - top).sum()) - row[after])
print(f"{path}: {windows} windows of {ctx}: perplexity {np.exp(np.mean(nll)):.4f}")
