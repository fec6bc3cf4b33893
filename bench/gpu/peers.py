"""PEFT + bitsandbytes on a GPU beside gpu_bench's layers and falcon_step, a line of JSON each. Needs torch, bitsandbytes, peft and, for the
step, transformers.

python3 bench/gpu/peers.py layers [--shapes OUTxIN,...] [--tokens N] [--rounds N]
    a linear layer in NF4 with an adapter of rank 64: forward, forward again (checkpointed) and backward
python3 bench/gpu/peers.py step [--layers N] [--batch N] [--tokens N] [--moments 8|32] [--steps N]
    a training step of Falcon-40b's shape, of so many of its 60 blocks, adapters of rank 64 on all linear layers
--device cpu tries either without a GPU; --small shrinks the step's model.

Adapters and arithmetic are in bfloat16, the fastest that the peer has.
"""
import argparse
import json
import statistics
import time
import warnings

warnings.filterwarnings("ignore")
import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

RANK = 64


def to_4bit(linear, device):
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                              device="meta")  # a weight of its own would be drawn and thrown away
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    layer = layer.to(device)
    if layer.weight.quant_state is None:
        layer.weight._quantize(device)
    return layer


def adapted(model, targets, **options):
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, **options))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    return model.train()


def median_seconds(f, rounds, device, calls=1):
    """Of one call in `rounds` times `calls` that are queued together, so that the host is ahead if it can be; two rounds more warm up."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        for _ in range(calls):
            f()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds[2:])


class One(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def layers(options):
    for shape in options.shapes.split(","):
        out, inputs = map(int, shape.split("x"))
        linear = torch.nn.Linear(inputs, out, bias=False, dtype=torch.bfloat16, device=options.device)
        model = adapted(One(to_4bit(linear, options.device)), ["linear"])
        x = torch.randn(options.tokens, inputs, dtype=torch.bfloat16, device=options.device, requires_grad=True)
        dy = torch.randn(options.tokens, out, dtype=torch.bfloat16, device=options.device)

        def one():
            x.grad = None  # ours is written, not added to
            checkpoint(model, x, use_reentrant=False).backward(dy)

        us = 1e6 * median_seconds(one, options.rounds, options.device, 1 if options.device == "cpu" else 10)
        assert x.grad is not None and torch.isfinite(x.grad).all()
        print(json.dumps({"op": "layer", "out": out, "in": inputs, "tokens": options.tokens, "who": "PEFT + bitsandbytes",
                          "us": round(us, 3), "torch": torch.__version__, "bitsandbytes": bnb.__version__}), flush=True)


def step(options):
    from transformers import FalconConfig, FalconForCausalLM

    width, heads, vocab = (64, 4, 128) if options.small else (8192, 128, 65024)
    config = FalconConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=options.layers, num_attention_heads=heads,
                          num_kv_heads=2 if options.small else 8, new_decoder_architecture=True, parallel_attn=True, bias=False,
                          alibi=False)
    torch.manual_seed(0)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = FalconForCausalLM(config)
    torch.set_default_dtype(default)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in targets:
                setattr(module, name, to_4bit(child, options.device))
    model = adapted(model, targets, task_type="CAUSAL_LM")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    in_8_bits = options.moments == 8 and options.device == "cuda"
    optimizer = bnb.optim.AdamW8bit(parameters, lr=1e-4) if in_8_bits else torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(0, vocab, (options.batch, options.tokens), device=options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def one():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    seconds = median_seconds(one, options.steps, options.device)
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    print(json.dumps({"peer_step": {"who": "PEFT + bitsandbytes", "layers": options.layers, "batch": options.batch,
                                    "tokens": options.tokens, "moments": options.moments, "median_s": round(seconds, 4),
                                    "peak_gb": round(1e-9 * peak, 3), "loss": round(float(one()), 4)}}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["layers", "step"])
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008,12288x4096,22016x4096,5120x5120,13824x5120,5120x13824,"
                                            "8192x8192,22016x8192,8192x22016,9216x8192,32768x8192,8192x32768")
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--moments", type=int, default=8, choices=[8, 32])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    options.tokens = options.tokens or (2048 if options.what == "layers" else 512)
    {"layers": layers, "step": step}[options.what](options)


if __name__ == "__main__":
    main()
