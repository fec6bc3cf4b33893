#!/usr/bin/env python3
"""Writes trained_bias/: an adapter on golden/qwen2, whose q, k and v have biases, that PEFT saved with bias="lora_only", all of it random, and
the logits that transformers and PEFT compute with it, and without.

    pip install torch transformers peft safetensors     (made with torch 2.15, transformers 5.24.0, peft 0.21.2)
    OMP_NUM_THREADS=1 python3 tests/golden/make_trained_bias.py
"""
import os
import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def base():
    return AutoModelForCausalLM.from_pretrained("qwen2", dtype=torch.float32).eval()  # the name that PEFT saves


def main():
    os.chdir(HERE)
    torch.manual_seed(8)
    folder = HERE / "trained_bias"
    shutil.rmtree(folder, ignore_errors=True)
    peft = get_peft_model(base(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], bias="lora_only",
                                             task_type="CAUSAL_LM"))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn_like(parameter) * 0.3)
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # What a reader of the saved files computes is what counts.
    again = PeftModel.from_pretrained(base(), folder).eval()
    with torch.no_grad():
        save_file({"input_ids": IDS[0].to(torch.int32), "logits": again(IDS).logits[0].contiguous(),
                   "base_logits": base()(IDS).logits[0].contiguous()}, folder / "io.safetensors")


if __name__ == "__main__":
    main()
