"""Writes kquants.safetensors: random blocks of ggml's quantized types and what gguf-py decodes them to.

    pip install gguf safetensors numpy        (made with gguf 0.19.0)
    python make_kquants.py [folder]

<type>/raw is U8 [blocks, block bytes], <type>/expected F32 [blocks, block elements]. Codes and sub-block scales are uniform random
bytes; the half-precision scales are random, with zero, a subnormal, the largest and negative ones among them, and always finite.
"""
import os
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from safetensors.numpy import save_file

BLOCKS = 8
SCALE_OFFSETS = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
SPECIAL = [0.0, 6e-8, 65504.0, -0.75]


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    random = np.random.Generator(np.random.PCG64(20240611))
    tensors = {}
    for name, offsets in SCALE_OFFSETS.items():
        kind = GGMLQuantizationType[name]
        elements, size = GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
        for shift, offset in enumerate(offsets):
            scales = random.normal(0, 0.02, BLOCKS)
            scales[shift:shift + len(SPECIAL)] = SPECIAL
            raw[:, offset:offset + 2] = scales.astype(np.float16).view(np.uint8).reshape(BLOCKS, 2)
        expected = quants.dequantize(raw, kind).astype(np.float32).reshape(BLOCKS, elements)
        assert np.isfinite(expected).all()
        tensors[f"{name}/raw"] = raw
        tensors[f"{name}/expected"] = expected
    save_file(tensors, os.path.join(folder, "kquants.safetensors"))


if __name__ == "__main__":
    main()
