"""Loads models that finetune --method full wrote into transformers, and compares logits.

    check_saved.py FOLDER

Each FOLDER/<name>.safetensors has the logits that evaluate has of the model FOLDER/<name>; FOLDER/ids.safetensors their token ids.
"""
import json
import os
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
ids = load_file(os.path.join(folder, "ids.safetensors"))["ids"].reshape(1, -1)
names = sorted(f.removesuffix(".safetensors") for f in os.listdir(folder) if f.endswith(".safetensors") and f != "ids.safetensors")
assert names, "nothing to compare"
for name in names:
    path = os.path.join(folder, name)
    with open(os.path.join(path, "config.json")) as file:
        config = json.load(file)
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), f"{name}: {report}"
    with torch.no_grad():
        found = model(ids).logits[0]
    expected = load_file(path + ".safetensors")["logits"]
    scale, difference = expected.abs().max().item(), (found - expected).abs().max().item()
    assert difference <= 1e-5 * scale, f"{name}: logits up to {scale} differ by {difference}"
    dtype = str(AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype).removeprefix("torch.")
    assert dtype == config.get("dtype", config.get("torch_dtype")), f"{name}: {dtype}"
    print(f"{name}, {dtype}: logits up to {scale:.3g} differ by {difference:.2g}")
