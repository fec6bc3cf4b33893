"""What scripts share that compare the logits of models which programs wrote with those that transformers has of them.

Each FOLDER/<name>.safetensors has the logits that evaluate has of the model FOLDER/<name>; FOLDER/ids.safetensors their token ids.
"""
import json
import os

import torch
from safetensors.torch import load_file


def models(folder):
    """(name, path, config.json) of each."""
    names = sorted(f.removesuffix(".safetensors") for f in os.listdir(folder) if f.endswith(".safetensors") and f != "ids.safetensors")
    assert names, "nothing to compare"
    for name in names:
        path = os.path.join(folder, name)
        with open(os.path.join(path, "config.json")) as file:
            yield name, path, json.load(file)


def compare(folder, name, model, tolerance, what=""):
    ids = load_file(os.path.join(folder, "ids.safetensors"))["ids"].reshape(1, -1)
    with torch.no_grad():
        found = model(ids).logits[0]
    expected = load_file(os.path.join(folder, name + ".safetensors"))["logits"]
    scale, difference = expected.abs().max().item(), (found - expected).abs().max().item()
    assert difference <= tolerance * scale, f"{name}: logits up to {scale} differ by {difference}"
    print(f"{name}{what}: logits up to {scale:.3g} differ by {difference:.2g}")
