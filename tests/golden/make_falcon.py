"""Writes falcon_*/: tiny FalconForCausalLM models with PEFT adapters, and what PyTorch computes of them in float32.

    pip install torch transformers peft safetensors     (made with torch 2.15, transformers 5.23.0, peft 0.21.2)
    OMP_NUM_THREADS=1 python make_falcon.py [folder]

falcon_7b is of Falcon-7B's kind (one norm, one key-value head), falcon_40b of Falcon-40B's (two norms, grouped queries), falcon_11b of
Falcon2-11B's (one norm, grouped queries, a head of its own, another rotary base), falcon_biased has as many key-value heads as heads and
biases everywhere. In each folder: config.json and model.safetensors, whose weights are rounded to bfloat16; adapter/, of rank 4 on all
linear layers; io.safetensors with input_ids, labels, logits, loss (mean over the scored tokens), logits_rank2 (of the first two
rows of the adapters alone) and grad/<parameter> of the loss.
"""
import os
import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import FalconConfig, FalconForCausalLM

torch.set_num_threads(1)
RANK = 4
MODELS = {
    "falcon_7b": dict(),
    "falcon_40b": dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=48),
    "falcon_11b": dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=56, num_ln_in_parallel_attn=1, num_hidden_layers=1,
                       tie_word_embeddings=False, rope_theta=500042.0),
    "falcon_biased": dict(multi_query=False, bias=True, ffn_hidden_size=40, num_hidden_layers=1),
}


def randomize(parameters, seed):
    for i, (name, p) in enumerate(sorted(parameters)):
        random = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i))
        is_norm = name.rsplit(".", 2)[-2].startswith(("ln_", "input_layernorm"))
        with torch.no_grad():
            if is_norm and name.endswith("weight"):
                p.copy_(1 + 0.3 * random)
            elif p.dim() == 1:
                p.copy_(0.2 * random)
            else:
                p.copy_(random * (0.4 if "embed" in name else 0.1 if "lora_B" in name else p.shape[1] ** -0.5))


def make(folder, name, options, seed):
    path = os.path.join(folder, name)
    shutil.rmtree(path, ignore_errors=True)
    shape = dict(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    model = FalconForCausalLM(FalconConfig(**{**shape, **options}))
    randomize(model.named_parameters(), seed)
    model.to(torch.bfloat16).save_pretrained(path)
    os.remove(os.path.join(path, "generation_config.json"))

    model = FalconForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    linears = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears, task_type="CAUSAL_LM"))
    adapters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 8 * model.config.num_hidden_layers
    randomize(((k, p) for k, p in adapters.items()), seed + 500)
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(os.path.join(path, "adapter"))
    os.remove(os.path.join(path, "adapter", "README.md"))

    ids = torch.randint(0, 48, (2, 10), generator=torch.Generator().manual_seed(seed + 900))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 8:] = -100
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    tensors = {"input_ids": ids.to(torch.int32), "labels": labels.to(torch.int32), "logits": output.logits.detach(),
               "loss": output.loss.detach().reshape(1)}
    for k, p in adapters.items():
        tensors["grad/" + k.replace(".default.weight", ".weight")] = p.grad
    with torch.no_grad():
        for k, p in adapters.items():
            if "lora_A" in k:
                p[2:] = 0
        tensors["logits_rank2"] = model(input_ids=ids).logits
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(path, "io.safetensors"))


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    for number, (name, options) in enumerate(MODELS.items()):
        make(target, name, options, 10000 * (number + 1))
