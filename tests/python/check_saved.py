"""Loads models that finetune --method full wrote into transformers, and compares logits: check_saved.py FOLDER, as logits.py says."""
import sys

import torch
from transformers import AutoModelForCausalLM

from logits import compare, models

folder = sys.argv[1]
for name, path, config in models(folder):
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), f"{name}: {report}"
    dtype = str(AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype).removeprefix("torch.")
    assert dtype == config.get("dtype", config.get("torch_dtype")), f"{name}: {dtype}"
    compare(folder, name, model, 1e-5, f", {dtype}")
