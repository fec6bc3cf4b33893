"""Writes tiny random Llamas as transformers saves them: a head of its own in float32, in shards; and one with a tied head in bfloat16.

    make_llama.py FOLDER

FOLDER/float32 and FOLDER/bfloat16.
"""
import os
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

for name, tied, shard in (("float32", False, "150KB"), ("bfloat16", True, "1GB")):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.12)
    model = LlamaForCausalLM(config)
    folder = os.path.join(sys.argv[1], name)
    model.to(getattr(torch, name)).save_pretrained(folder, max_shard_size=shard)
    assert os.path.exists(os.path.join(folder, "model.safetensors.index.json")) == (not tied), os.listdir(folder)
