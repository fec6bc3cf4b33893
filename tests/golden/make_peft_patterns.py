"""Golden adapter with ranks and alphas by pattern, and what Python's re says of expressions; needs torch, peft and safetensors.

    make_peft_patterns.py FOLDER      writes adapter_config.json, adapter_model.safetensors, io.safetensors, expressions.json
"""
import json
import os
import re
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

folder = sys.argv[1]
os.makedirs(folder, exist_ok=True)


class Layer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj = torch.nn.Linear(width, width, bias=False)
        self.up_proj = torch.nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.up_proj(torch.tanh(self.q_proj(x))))


class Model(torch.nn.Module):
    def __init__(self, width=12, layers=12):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


torch.manual_seed(7)
model = get_peft_model(Model(), LoraConfig(
    r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"],
    rank_pattern={r"layers\.[0-2]\.up_proj": 5, "^layers.3.q_proj": 2, r"layers\.1\d\..*": 1},
    alpha_pattern={r"^layers\.(0|4)\.(q|up)_proj": 9, "layers.5.q_proj": 1.5}))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0.0, 0.3)
    x = torch.randn(5, 12)
    tensors = {"x": x, "y": model(x)}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            tensors[f"{name}.weight"] = module.base_layer.weight.detach().clone()
            tensors[f"{name}.delta"] = module.get_delta_weight("default").detach()
model.save_pretrained(folder)
os.remove(os.path.join(folder, "README.md"))
save_file(tensors, os.path.join(folder, "io.safetensors"))

names = ["layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "model.layers.1.mlp.up_proj",
         "h.0.attn", "q_proj", "xq_proj", ""]
expressions = [r"q_proj", r".*q_proj", r"(.*\.)?(q_proj)$", r"(.*\.)?(^layers\.0\.self_attn\.q_proj)$", r"(.*\.)?(layers\.(0|1)\..*)$",
               r"(.*\.)?(layers\.[0-9]\.mlp\.(up|down)_proj)$", r"(.*\.)?(layers\.\d+\.\w+\.[^.]+)$", r"[a-z_.]*", r"(?:model\.)?layers.*",
               r"model\.layers\.1.?\.mlp\..+?", r"(.*\.)?(self_attn\.q_proj|mlp\.up_proj)$", r"(a|b*)*", r"x?q_proj", r"^q_proj$", r"q$_proj",
               r"(.*\.)?([q-s]_proj)$", r"[\w.]+", r"(h|model)\.(\d|layers)\..*", r"(.*\.)?(.*attn)$", r"", r"()", r"[a\-x]*q_proj", r"[^x]q.*",
               r"(((m)odel)\.)*layers.*", r"model\.layers\.1+0?\.mlp\.up_proj", r"[.]*|q\_proj"]
cases = [{"expression": e, "name": n, "matches": re.fullmatch(e, n) is not None} for e in expressions for n in names]
with open(os.path.join(folder, "expressions.json"), "w") as file:
    json.dump(cases, file, indent=0)
