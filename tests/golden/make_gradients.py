"""Writes qwen2/gradients.safetensors and falcon_40b/gradients.safetensors: gradients of all weights of these models by PyTorch in float64.

    pip install torch transformers safetensors     (made with torch 2.15, transformers 5.24.0)
    OMP_NUM_THREADS=1 python make_gradients.py [folder]

Of the mean cross-entropy of each token of input_ids but the first, given those before it, of the first sequence of the folder's io.safetensors.
Each is under its parameter's name, in float32; "loss" beside them. The models' are make_llamas.py's and make_falcon.py's.
"""
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


def make(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    ids = load_file(os.path.join(folder, "io.safetensors"))["input_ids"][:1].long()
    model.train()  # its dropout is 0
    logits = model(input_ids=ids).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    loss.backward()
    tensors = {name: p.grad.float().contiguous() for name, p in model.named_parameters()}
    tensors["loss"] = loss.detach().float().reshape(1)
    save_file(tensors, os.path.join(folder, "gradients.safetensors"))
    print(folder, loss.item(), len(tensors))


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    for name in ("qwen2", "falcon_40b"):
        make(os.path.join(target, name))
