"""llama.cpp's logits of a model with and without an adapter, whose files stand in the folder with ours: the adapter must move both alike.

model.gguf, adapter.gguf; ids.npy, int32; base.npy and adapted.npy, our logits [tokens, vocab].
"""
import ctypes
import pathlib
import sys

import llama_cpp
import numpy as np

folder = pathlib.Path(sys.argv[1])
ids = np.load(folder / "ids.npy").tolist()


# Of weights in blocks llama.cpp rounds activations to 8 bits, which hides what an adapter does: of the same weights in float32 it does not.
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
options.allow_requantize = True
plain = folder / "plain.gguf"
assert llama_cpp.llama_model_quantize(str(folder / "model.gguf").encode(), str(plain).encode(), ctypes.byref(options)) == 0


def logits(**options):
    model = llama_cpp.Llama(str(plain), n_ctx=len(ids) + 1, n_batch=len(ids), logits_all=True, verbose=False, **options)
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float64)


base, adapted = logits(), logits(lora_path=str(folder / "adapter.gguf"))
our_base, our_adapted = (np.load(folder / f"{name}.npy").astype(np.float64) for name in ("base", "adapted"))


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


moved, difference = distance(our_adapted, our_base), distance(adapted - base, our_adapted - our_base)
print(f"base: {distance(base, our_base):.1e} apart; the adapter moves ours by {moved:.3f}, theirs {difference:.1e} differently")
assert distance(base, our_base) < 5e-3
assert moved > 0.1, "an adapter that does nothing shows nothing"
assert difference < 1e-2
