"""Loads 4-bit weights written by the library into bitsandbytes and compares what it decodes, bit for bit.

    check_bitsandbytes.py FOLDER

FOLDER/weights.safetensors has weights under bitsandbytes' keys, FOLDER/expected.safetensors what they decode to, by the same names.
"""
import os
import sys

import torch
from bitsandbytes import functional
from safetensors.torch import load_file

folder = sys.argv[1]
tensors = load_file(os.path.join(folder, "weights.safetensors"))
expected = load_file(os.path.join(folder, "expected.safetensors"))
assert expected, "nothing to compare"
for name, values in expected.items():
    parts = {key: tensors[key] for key in tensors if key.startswith(name + ".")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    assert tuple(state.shape) == tuple(values.shape), f"{name}: shape {tuple(state.shape)}"
    assert state.dtype == values.dtype, f"{name}: {state.dtype}"
    # As a vector: in two dimensions bitsandbytes on AVX-512 takes wrong scales where rows are no multiple of the block.
    state.shape = torch.Size([values.numel()])
    decoded = functional.dequantize_4bit(tensors[name], state).reshape(values.shape)
    assert torch.equal(decoded, values), f"{name}: {(decoded != values).sum().item()} of {values.numel()} values differ"
    print(f"{name}: {values.numel()} {str(values.dtype)[6:]} values equal")
