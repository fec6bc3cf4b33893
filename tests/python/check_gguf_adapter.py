"""llama.cpp's logits of a model with and without an adapter, whose files stand in the folder with ours: the adapter must move both alike.

model.gguf, adapter.gguf; ids.npy, int32; base.npy and adapted.npy, our logits [tokens, vocab].
"""
import pathlib
import sys

import numpy as np
from llama_cpp import Llama

folder = pathlib.Path(sys.argv[1])
ids = np.load(folder / "ids.npy").tolist()


def logits(**options):
    model = Llama(str(folder / "model.gguf"), n_ctx=len(ids) + 1, n_batch=len(ids), logits_all=True, verbose=False, **options)
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float64)


base, adapted = logits(), logits(lora_path=str(folder / "adapter.gguf"))
our_base, our_adapted = (np.load(folder / f"{name}.npy").astype(np.float64) for name in ("base", "adapted"))


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# llama.cpp multiplies this model's weights with activations of 8 bits: its logits are some percent from ours before any adapter.
print(f"base: {distance(base, our_base):.4f} apart; the adapter moves ours by {distance(our_adapted, our_base):.3f}, "
      f"theirs {distance(adapted - base, our_adapted - our_base):.4f} differently")
assert distance(base, our_base) < 0.05
assert distance(our_adapted, our_base) > 0.1, "an adapter that does nothing shows nothing"
assert distance(adapted - base, our_adapted - our_base) < 0.1
