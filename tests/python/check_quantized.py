"""Loads folders in bitsandbytes' 4 bits, which the programs wrote, into transformers, and compares logits: check_quantized.py FOLDER, as
logits.py says."""
import json
import sys

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from logits import compare, models

folder = sys.argv[1]
for name, path, saved in models(folder):
    written = saved["quantization_config"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=written["bnb_4bit_quant_type"],
                                bnb_4bit_use_double_quant=written["bnb_4bit_use_double_quant"],
                                bnb_4bit_compute_dtype=written["bnb_4bit_compute_dtype"])
    assert written == json.loads(json.dumps(config.to_dict())), f"{name}: {written} is not {config.to_dict()}"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", attn_implementation="eager")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {n for n, m in linears.items() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantized == {n for n in linears if "layers." in n} and len(quantized) == 14, f"{name}: {quantized} of {list(linears)}"
    model.train()  # in eval mode bitsandbytes' CPU path rounds weights and inputs to bfloat16; there is no dropout
    compare(folder, name, model, {"float32": 1e-5, "bfloat16": 3e-2}[written["bnb_4bit_compute_dtype"]])
