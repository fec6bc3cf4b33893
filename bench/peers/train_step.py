"""The training step of train_step_bench.cpp in PyTorch + PEFT + bitsandbytes, for a comparison side by side.

usage: train_step.py THREADS        (pip install torch transformers peft bitsandbytes)
Prints the fastest of 5 steps, tokens per second, and the peak of resident memory while stepping.
"""
import sys
import threading
import time
import warnings

warnings.filterwarnings("ignore")
import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
torch.set_num_threads(threads)
torch.manual_seed(0)
TOKENS = 256
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def to_4bit(linear):
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight._quantize("cpu")
    return layer


model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                     num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
                                     tie_word_embeddings=True)).to(torch.float32)
for module in list(model.modules()):
    for name, child in list(module.named_children()):
        if name in PROJECTIONS:
            setattr(module, name, to_4bit(child))
model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
model.train()
parameters = [p for p in model.parameters() if p.requires_grad]
for p in parameters:
    p.data = p.data.float()
optimizer = torch.optim.AdamW(parameters, lr=1e-4)
ids = torch.randint(0, 49152, (1, TOKENS + 1))

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
best = min(times[1:])
print(f"torch {torch.__version__} bitsandbytes {bnb.__version__} threads {threads}: {best:.3f} s a step, {TOKENS / best:.1f} tokens/s, peak {peak:.0f} MiB")
