"""Loads adapters saved by the library into PEFT, on a small module, and compares outputs.

    check_peft.py FOLDER

FOLDER/model.safetensors has the base weights and an input x; FOLDER/expected.safetensors has for each adapter folder beside it, by
its name, the output the library computes.
"""
import os
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file


class Model(torch.nn.Module):
    """Modules whose names are ends of each other, as rank_pattern's keys must tell apart."""

    def __init__(self, tensors, biased):
        super().__init__()
        self.up = linear(tensors["up"], biased)
        self.block = torch.nn.Module()
        self.block.up = linear(tensors["block.up"])
        self.plain = linear(tensors["plain"])

    def forward(self, x):
        return self.plain(torch.relu(self.block.up(torch.relu(self.up(x)))))


def linear(weight, biased=False):
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=biased)
    module.weight.data.copy_(weight)
    if biased:
        module.bias.data.zero_()
    return module


folder = sys.argv[1]
tensors = load_file(os.path.join(folder, "model.safetensors"))
expected = load_file(os.path.join(folder, "expected.safetensors"))
assert len(expected) > 1, "nothing to compare"
for name, output in expected.items():
    with torch.no_grad():
        model = Model(tensors, biased=name.startswith("bias"))
        base = model(tensors["x"])
        model = PeftModel.from_pretrained(model, os.path.join(folder, name))
        difference = (model(tensors["x"]) - output).abs().max().item()
    scale = output.abs().max().item()
    assert (base - output).abs().max().item() > 1e-2 * scale, f"{name}: the adapter changes next to nothing"
    assert not hasattr(model.base_model.model.plain, "lora_A"), f"{name}: an adapter on a module that has none"
    assert difference <= 1e-5 * scale, f"{name}: outputs up to {scale} differ by {difference}"
    print(f"{name}: outputs up to {scale:.3g} differ by {difference:.2g}")
