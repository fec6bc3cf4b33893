"""Writes qwen2/ and mistral/: tiny models of Llama's shape under other names, and their logits by PyTorch in float32.

    pip install torch transformers safetensors     (made with torch 2.15, transformers 5.23.0)
    OMP_NUM_THREADS=1 python make_llamas.py [folder]

qwen2 has biases on q, k and v; mistral a sliding window shorter than its positions. In each folder: config.json and model.safetensors, whose
weights are rounded to bfloat16; io.safetensors with input_ids and logits.
"""
import os
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
SHAPE = dict(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64)
MODELS = {
    "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_theta=1e6, tie_word_embeddings=True)),
    "mistral": MistralForCausalLM(MistralConfig(**SHAPE, head_dim=16, sliding_window=12)),
}


def make(folder, name, model, seed):
    path = os.path.join(folder, name)
    shutil.rmtree(path, ignore_errors=True)
    for i, (parameter, p) in enumerate(sorted(model.named_parameters())):
        random = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i))
        with torch.no_grad():
            p.copy_(1 + 0.3 * random if "norm" in parameter else 0.3 * random if p.dim() == 1 else random * p.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(path)
    if os.path.exists(os.path.join(path, "generation_config.json")):
        os.remove(os.path.join(path, "generation_config.json"))
    model = type(model).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, 48, (1, 12), generator=torch.Generator().manual_seed(seed + 900))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"input_ids": ids.to(torch.int32), "logits": logits.contiguous()}, os.path.join(path, "io.safetensors"))


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    for number, (name, model) in enumerate(MODELS.items()):
        make(target, name, model, 10000 * (number + 1))
