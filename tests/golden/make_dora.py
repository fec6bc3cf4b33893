"""Writes dora/: a PEFT adapter with DoRA on two linear layers, and what PyTorch computes with it in float32.

    pip install torch peft safetensors     (made with torch 2.15, peft 0.21.2)
    OMP_NUM_THREADS=1 python make_dora.py [folder]

up is [40, 24] without bias, down [12, 40] with one; the model is down(up(x)). adapter/ is of rank 4 with all tensors random. io.safetensors
has up.weight, down.weight, down.bias, up.magnitude0 and down.magnitude0 (PEFT's initial magnitudes), x, dy, y, dx and grad/<tensor of the
adapter> (the loss is sum(y * dy)), merged/<layer> (PEFT's merged weights), and y_rank2: the output of the first two rows of the adapters
alone at the same scale, whose norms PEFT finds anew.
"""
import os
import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

torch.set_num_threads(1)
RANK, TOKENS = 4, 9


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(24, 40, bias=False)
        self.down = torch.nn.Linear(40, 12)

    def forward(self, x):
        return self.down(self.up(x))


def random(shape, seed, deviation):
    return deviation * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(folder):
    path = os.path.join(folder, "dora")
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    model = Model()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(random(p.shape, i, 0.2))
    tensors = {k: p.detach().clone() for k, p in model.named_parameters()}
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["up", "down"], use_dora=True))
    adapter = {k.replace("base_model.model.", "").replace(".default", ""): p for k, p in model.named_parameters() if p.requires_grad}
    assert len(adapter) == 6
    with torch.no_grad():
        for i, (k, p) in enumerate(sorted(adapter.items())):
            if "magnitude" in k:
                tensors[k.split(".")[0] + ".magnitude0"] = p.detach().clone()
                p.mul_(1 + random(p.shape, 20 + i, 0.3))
            else:
                p.copy_(random(p.shape, 20 + i, 0.2))
    model.save_pretrained(os.path.join(path, "adapter"))
    os.remove(os.path.join(path, "adapter", "README.md"))

    x = random((TOKENS, 24), 50, 1.0).requires_grad_()
    dy = random((TOKENS, 12), 51, 1.0)
    y = model(x)
    (y * dy).sum().backward()
    tensors.update(x=x.detach(), dy=dy, y=y.detach(), dx=x.grad)
    for k, p in adapter.items():
        tensors["grad/" + k.replace("magnitude_vector.weight", "magnitude_vector")] = p.grad
    with torch.no_grad():
        kept = {k: p.detach().clone() for k, p in adapter.items() if "lora_A" in k}
        for k in kept:
            adapter[k][2:] = 0
        tensors["y_rank2"] = model(x)
        for k, value in kept.items():
            adapter[k].copy_(value)
        merged = model.merge_and_unload()
        tensors["merged/up"], tensors["merged/down"] = merged.up.weight, merged.down.weight
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, os.path.join(path, "io.safetensors"))


if __name__ == "__main__":
    make(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
