"""Loads a Llama model and adapters saved by the library into transformers and PEFT, and compares logits.

    check_llama.py FOLDER

FOLDER/base is the model. FOLDER/expected.safetensors has ids and for each adapter folder beside it, by its name, the logits the
library computes.
"""
import os
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

folder = sys.argv[1]
expected = load_file(os.path.join(folder, "expected.safetensors"))
ids = expected.pop("ids").reshape(1, -1)
assert len(expected) > 1, "nothing to compare"
for name, logits in expected.items():
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(os.path.join(folder, "base"), dtype=torch.float32, attn_implementation="eager")
        model.eval()
        base = model(ids).logits[0]
        model = PeftModel.from_pretrained(model, os.path.join(folder, name)).eval()
        difference = (model(ids).logits[0] - logits).abs().max().item()
    scale = logits.abs().max().item()
    assert (base - logits).abs().max().item() > 1e-2 * scale, f"{name}: the adapter changes next to nothing"
    assert difference <= 1e-5 * scale, f"{name}: logits up to {scale} differ by {difference}"
    print(f"{name}: logits up to {scale:.3g} differ by {difference:.2g}")
