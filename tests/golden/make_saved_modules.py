#!/usr/bin/env python3
"""Writes saved_modules/{tied,untied}: a tiny random Llama whose head is its embedding, and one with a head of its own; for each, adapters that
PEFT saved with modules_to_save, random, and the logits that transformers and PEFT compute with them.

    pip install torch transformers peft safetensors     (made with torch 2.15, transformers 5.24.0, peft 0.21.2)
    OMP_NUM_THREADS=1 python3 tests/golden/make_saved_modules.py
"""
import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent / "saved_modules"
MODULES = {"head": ["lm_head"], "embedding": ["embed_tokens"], "both": ["embed_tokens", "lm_head"], "norms": ["norm", "input_layernorm"]}


def randomize(parameters):
    for parameter in parameters:
        parameter.data.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))


def main():
    torch.manual_seed(6)
    for kind in ("tied", "untied"):
        folder = HERE / kind
        shutil.rmtree(folder, ignore_errors=True)
        config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=kind == "tied", pad_token_id=None)
        model = LlamaForCausalLM(config).eval()
        randomize(model.parameters())
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        tensors = {"input_ids": ids[0].to(torch.int32)}
        for name, modules in MODULES.items():
            base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            peft = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], modules_to_save=modules,
                                                   task_type="CAUSAL_LM", base_model_name_or_path="tiny"))
            randomize(p for p in peft.parameters() if p.requires_grad)
            peft.save_pretrained(folder / name)
            (folder / name / "README.md").unlink(missing_ok=True)
            # What a reader of the saved files computes is what counts.
            again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), folder / name).eval()
            with torch.no_grad():
                tensors[name] = again(ids).logits[0].contiguous()
        save_file(tensors, folder / "io.safetensors")


if __name__ == "__main__":
    main()
