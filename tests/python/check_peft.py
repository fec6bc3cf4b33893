"""Loads adapters saved by the library into PEFT, on a small module, and compares outputs.

    check_peft.py FOLDER

FOLDER/model.safetensors has the base weights and an input x; FOLDER/expected.safetensors has for each adapter folder beside it, by
its name, the output the library computes. Where the name begins with "conv1d" the adapted modules store their weights [in, out].
"""
import os
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D


class Model(torch.nn.Module):
    """Modules whose names are ends of each other, as rank_pattern's keys must tell apart."""

    def __init__(self, tensors, biased, make):
        super().__init__()
        self.up = make(tensors["up"], biased)
        self.block = torch.nn.Module()
        self.block.up = make(tensors["block.up"])
        self.plain = linear(tensors["plain"])

    def forward(self, x):
        return self.plain(torch.relu(self.block.up(torch.relu(self.up(x)))))


def linear(weight, biased=False):
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=biased)
    module.weight.data.copy_(weight)
    if biased:
        module.bias.data.zero_()
    return module


def conv1d(weight, biased=False):
    module = Conv1D(*weight.shape)
    module.weight.data.copy_(weight.T)
    return module


folder = sys.argv[1]
tensors = load_file(os.path.join(folder, "model.safetensors"))
expected = load_file(os.path.join(folder, "expected.safetensors"))
assert len(expected) > 1, "nothing to compare"
for name, output in expected.items():
    with torch.no_grad():
        model = Model(tensors, name.startswith("bias"), conv1d if name.startswith("conv1d") else linear)
        base = model(tensors["x"])
        model = PeftModel.from_pretrained(model, os.path.join(folder, name))
        difference = (model(tensors["x"]) - output).abs().max().item()
        turned = [module.fan_in_fan_out for module in model.modules() if hasattr(module, "lora_A")]
    assert turned == [name.startswith("conv1d")] * 2, f"{name}: {turned}"
    scale = output.abs().max().item()
    assert (base - output).abs().max().item() > 1e-2 * scale, f"{name}: the adapter changes next to nothing"
    assert not hasattr(model.base_model.model.plain, "lora_A"), f"{name}: an adapter on a module that has none"
    assert difference <= 1e-5 * scale, f"{name}: outputs up to {scale} differ by {difference}"
    print(f"{name}: outputs up to {scale:.3g} differ by {difference:.2g}")
