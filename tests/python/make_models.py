"""Writes tiny random models as transformers saves them, their rows whole blocks of 64: bitsandbytes' CPU path decodes no others.

    make_models.py FOLDER

FOLDER/float32 and FOLDER/bfloat16, Llamas: a head of its own, in shards; and one with a tied head. FOLDER/qwen2, with biases; FOLDER/falcon_7b and
FOLDER/falcon_40b, of fused queries, keys and values.
"""
import os
import sys

import torch
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, Qwen2Config

shape = dict(vocab_size=48, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.12)
gated = dict(shape, intermediate_size=128, num_key_value_heads=2)
falcon = dict(shape, ffn_hidden_size=128, alibi=False, bias=False, parallel_attn=True)
configs = {
    "float32": LlamaConfig(**gated, tie_word_embeddings=False),
    "bfloat16": LlamaConfig(**gated, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**gated, tie_word_embeddings=True),
    "falcon_7b": FalconConfig(**falcon, multi_query=True, new_decoder_architecture=False),
    "falcon_40b": FalconConfig(**falcon, num_kv_heads=2, new_decoder_architecture=True),
}
for name, config in configs.items():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for parameter, value in model.named_parameters():
        if parameter.endswith("bias"):
            torch.nn.init.normal_(value, std=0.2)
    folder = os.path.join(sys.argv[1], name)
    shards = name == "float32"
    model.to(torch.bfloat16 if name == "bfloat16" else torch.float32).save_pretrained(folder, max_shard_size="150KB" if shards else "1GB")
    assert os.path.exists(os.path.join(folder, "model.safetensors.index.json")) == shards, os.listdir(folder)
