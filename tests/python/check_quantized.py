"""Loads folders in bitsandbytes' 4 bits, which the programs wrote, into transformers, and compares logits.

    check_quantized.py FOLDER

Each FOLDER/<name>.safetensors has the logits that evaluate has of the model FOLDER/<name>; FOLDER/ids.safetensors their token ids.
"""
import json
import os
import sys

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

folder = sys.argv[1]
ids = load_file(os.path.join(folder, "ids.safetensors"))["ids"].reshape(1, -1)
names = sorted(f.removesuffix(".safetensors") for f in os.listdir(folder) if f.endswith(".safetensors") and f != "ids.safetensors")
assert names, "nothing to compare"
for name in names:
    path = os.path.join(folder, name)
    with open(os.path.join(path, "config.json")) as file:
        written = json.load(file)["quantization_config"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=written["bnb_4bit_quant_type"],
                                bnb_4bit_use_double_quant=written["bnb_4bit_use_double_quant"],
                                bnb_4bit_compute_dtype=written["bnb_4bit_compute_dtype"])
    assert written == json.loads(json.dumps(config.to_dict())), f"{name}: {written} is not {config.to_dict()}"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", attn_implementation="eager")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {n for n, m in linears.items() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantized == {n for n in linears if "layers." in n} and len(quantized) == 14, f"{name}: {quantized} of {list(linears)}"
    model.train()  # in eval mode bitsandbytes' CPU path rounds weights and inputs to bfloat16; there is no dropout
    with torch.no_grad():
        found = model(ids).logits[0]
    expected = load_file(path + ".safetensors")["logits"]
    scale, difference = expected.abs().max().item(), (found - expected).abs().max().item()
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[written["bnb_4bit_compute_dtype"]]
    assert difference <= tolerance * scale, f"{name}: logits up to {scale} differ by {difference}"
    print(f"{name}: logits up to {scale:.3g} differ by {difference:.2g}")
