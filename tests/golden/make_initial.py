"""Golden initial values of PEFT: PiSSA and LoftQ of one weight; needs torch, peft, bitsandbytes and safetensors.

    make_initial.py FILE.safetensors

w [out, in]; pissa.product = scaling * B A and pissa.base = the rest, of rank 6; loftq<n>.product and loftq<n>.base after n iterations, base
in NF4 with float scales.
"""
import inspect
import sys

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import loftq_utils
from safetensors.torch import save_file

rank = 6
torch.manual_seed(3)
module = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
with torch.no_grad():  # a spectrum that falls
    w = torch.randn(32, 12) @ torch.diag(0.7 ** torch.arange(12.0)) @ torch.randn(12, 64) * 0.1 + torch.randn(32, 64) * 0.02
    module[0].weight.copy_(w)
tensors = {"w": w}
layer = get_peft_model(module, LoraConfig(r=rank, lora_alpha=17, target_modules=["0"], init_lora_weights="pissa")).base_model.model[0]
tensors["pissa.product"] = layer.get_delta_weight("default").detach()
tensors["pissa.base"] = layer.base_layer.weight.detach().clone()
# loftq_init takes a GPU for granted; its arithmetic is the same on a CPU.
exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), loftq_utils.__dict__)
for iterations in (1, 5):
    base, a, b = loftq_utils.loftq_init(w, num_bits=4, reduced_rank=rank, num_iter=iterations)
    tensors[f"loftq{iterations}.product"] = (b @ a).contiguous()
    tensors[f"loftq{iterations}.base"] = base.contiguous()
save_file(tensors, sys.argv[1])
