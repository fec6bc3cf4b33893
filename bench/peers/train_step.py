"""The training step of train_step_bench.cpp in PyTorch + PEFT + bitsandbytes, for a comparison side by side.

usage: train_step.py [THREADS] [--bf16] [--checkpoint]      (build/peers/venv/bin/python, which run.sh --setup makes, has what it needs)
  --bf16         model, adapters and arithmetic in bfloat16; without it float32
  --checkpoint   keep only each block's input and run blocks again in the backward pass
Prints the fastest and the median of 5 steps, tokens per second, and the peak of resident memory while stepping.
"""
import argparse
import gc
import statistics
import threading
import time
import warnings

warnings.filterwarnings("ignore")
import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("threads", nargs="?", type=int, default=2)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--checkpoint", action="store_true")
options = parser.parse_args()
dtype = torch.bfloat16 if options.bf16 else torch.float32
torch.set_num_threads(options.threads)
torch.manual_seed(0)
TOKENS = 256
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def to_4bit(linear):
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight._quantize("cpu")
    return layer


model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                     num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
                                     tie_word_embeddings=True)).to(dtype)
for module in list(model.modules()):
    for name, child in list(module.named_children()):
        if name in PROJECTIONS:
            setattr(module, name, to_4bit(child))
model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
if options.checkpoint:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
model.train()
parameters = [p for p in model.parameters() if p.requires_grad]
for p in parameters:
    p.data = p.data.to(dtype)
optimizer = torch.optim.AdamW(parameters, lr=1e-4)
ids = torch.randint(0, 49152, (1, TOKENS + 1))
gc.collect()  # what loading left behind is no part of a step

peak, running = 0.0, True


def watch():
    global peak
    while running:
        with open("/proc/self/statm") as f:
            peak = max(peak, int(f.read().split()[1]) * 4096 / 2**20)
        time.sleep(0.005)


watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
times = []
for step in range(6):
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.3)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
running = False
best, median = min(times[1:]), statistics.median(times[1:])
name = f"torch {torch.__version__} bitsandbytes {bnb.__version__} {'bfloat16' if options.bf16 else 'float32'}"
print(f"{name}{' checkpointed' if options.checkpoint else ''}, threads {options.threads}: {best:.3f} s a step (median {median:.3f}), "
      f"{TOKENS / best:.1f} tokens/s (median {TOKENS / median:.1f}), peak {peak:.0f} MiB")
