"""Loads folders in bitsandbytes' 4 bits, which the programs wrote, into transformers, and compares logits: check_quantized.py FOLDER, as
logits.py says."""
import json
import os
import sys

import bitsandbytes as bnb
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from logits import compare, models


def decoded(path):
    """The model in floats, its codes decoded by bitsandbytes: transformers 5 does not load a Falcon's."""
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    tensors = load_file(os.path.join(path, "model.safetensors"))
    weights = {name for name in tensors if name + ".absmax" in tensors}
    parts = {name: {n: t for n, t in tensors.items() if n.startswith(name + ".")} for name in weights}
    for name in weights:
        state = bnb.functional.QuantState.from_dict(dict(parts[name]), device="cpu")
        tensors[name] = bnb.functional.dequantize_4bit(tensors[name], state)
        for part in parts[name]:
            del tensors[part]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, f"{path}: {missing} are missing, {unexpected} too many"
    assert weights == {n + ".weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".h." in n}, f"{path}: {weights}"
    return model


folder = sys.argv[1]
for name, path, saved in models(folder):
    written = saved["quantization_config"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=written["bnb_4bit_quant_type"],
                                bnb_4bit_use_double_quant=written["bnb_4bit_use_double_quant"],
                                bnb_4bit_compute_dtype=written["bnb_4bit_compute_dtype"])
    assert written == json.loads(json.dumps(config.to_dict())), f"{name}: {written} is not {config.to_dict()}"
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[written["bnb_4bit_compute_dtype"]]
    if saved["model_type"] == "falcon":
        compare(folder, name, decoded(path), tolerance)
        continue
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", attn_implementation="eager")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {n for n, m in linears.items() if isinstance(m, bnb.nn.Linear4bit)}
    assert quantized == {n for n in linears if "layers." in n} and len(quantized) == 14, f"{name}: {quantized} of {list(linears)}"
    model.train()  # in eval mode bitsandbytes' CPU path rounds weights and inputs to bfloat16; there is no dropout
    compare(folder, name, model, tolerance)
