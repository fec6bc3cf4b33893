"""Writes quantized/: a tiny Llama in bitsandbytes' 4 bits as transformers saves it, in four ways, and its logits by PyTorch in float32.

    pip install torch transformers accelerate bitsandbytes safetensors     (made with torch 2.15, transformers 5.23.0, bitsandbytes 0.50.2)
    OMP_NUM_THREADS=1 python make_quantized.py [folder]

fp4 has double-quantized scales, fp4_plain and nf4_plain scales in float32, nf4_storage double-quantized ones and its codes stored as
bfloat16. Each is a folder with config.json and model.safetensors; io.safetensors has input_ids and the logits of each by its name.
"""
import os
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
WAYS = {"fp4": dict(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
        "fp4_plain": dict(bnb_4bit_quant_type="fp4"),
        "nf4_plain": dict(bnb_4bit_quant_type="nf4"),
        "nf4_storage": dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=torch.bfloat16)}


def make(folder):
    path = os.path.join(folder, "quantized")
    shutil.rmtree(path, ignore_errors=True)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                         num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True))
    for i, (parameter, p) in enumerate(sorted(model.named_parameters())):
        random = torch.randn(p.shape, generator=torch.Generator().manual_seed(40000 + i))
        with torch.no_grad():
            p.copy_(1 + 0.3 * random if "norm" in parameter else random * p.shape[1] ** -0.5)
    whole = os.path.join(path, "whole")
    model.save_pretrained(whole)
    ids = torch.randint(0, 32, (1, 12), generator=torch.Generator().manual_seed(40900))
    io = {"input_ids": ids.to(torch.int32)}
    for name, way in WAYS.items():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **way)
        model = LlamaForCausalLM.from_pretrained(whole, quantization_config=config, device_map="cpu", attn_implementation="eager")
        model.save_pretrained(os.path.join(path, name))
        os.remove(os.path.join(path, name, "generation_config.json"))
        model.train()  # in eval mode bitsandbytes' CPU path rounds weights and inputs to bfloat16; there is no dropout
        with torch.no_grad():
            io[name] = model(input_ids=ids).logits.contiguous()
    shutil.rmtree(whole)
    save_file(io, os.path.join(path, "io.safetensors"))


if __name__ == "__main__":
    make(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
