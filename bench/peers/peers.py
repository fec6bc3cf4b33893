"""The peers that come as Python packages; prints the same lines as the C++ programs here (cells.hpp says what they mean).

usage: peers.py torch|bitsandbytes|onnxruntime|quantize OUT IN THREADS TOKENS[,TOKENS...] MEGABYTES SECONDS

A kernel takes activations in the type it works in: bfloat16 kernels get bfloat16. The error is against double arithmetic on the decoded
weights and the float32 activations from which those were rounded.
"""
import copy
import json
import math
import os
import re
import sys
import time
import warnings

import numpy as np

warnings.filterwarnings("ignore")


class Task:
    def __init__(self, out, cols, threads, tokens, megabytes, seconds):
        self.out, self.cols, self.threads = int(out), int(cols), int(threads)
        self.tokens = [int(m) for m in tokens.split(",")]
        self.bytes, self.seconds = 1e6 * float(megabytes), float(seconds)

    def copies(self, bytes_of_one):
        return min(512, max(2, math.ceil(self.bytes / bytes_of_one)))

    def group(self, tokens):
        return 1 if self.out * self.cols > 2_000_000 else min(16, max(1, 256 // tokens))


def probes(tokens):
    return sorted({0, tokens // 3, 2 * tokens // 3, tokens - 1})


def random_matrix(rows, cols, deviation, seed):
    """The distribution of cells.hpp: a sum of four uniform numbers; rows repeat after 512."""
    parts = np.random.default_rng(seed).random((4, min(rows, 512), cols), dtype=np.float32)
    fresh = (parts.sum(0) - np.float32(2)) * np.float32(math.sqrt(3) * deviation)
    return np.tile(fresh, (math.ceil(rows / 512), 1))[:rows].copy()


class Reference:
    """Products of the probed rows in double arithmetic: x . weight, weight [depth, cols]."""

    def __init__(self, task, x, weight):
        rows = sorted({row for tokens in task.tokens for row in probes(tokens)})
        self.rows = dict(zip(rows, x[rows].astype(np.float64) @ weight.astype(np.float64)))

    def error(self, y):
        rows = probes(len(y))
        right = np.stack([self.rows[row] for row in rows])
        return float(np.linalg.norm(y[rows].astype(np.float64) - right) / np.linalg.norm(right))


too_slow = 1.0  # seconds of a product: it is timed once, and more tokens are left out


def measure(seconds, products, sample):
    before = time.perf_counter()
    sample(0)
    first = (time.perf_counter() - before) / products
    if first >= too_slow:
        return first, first
    times, start, i = [], time.perf_counter(), 1
    while True:
        before = time.perf_counter()
        sample(i)
        after = time.perf_counter()
        times.append((after - before) / products)
        i += 1
        if (len(times) >= 5 and after - start >= seconds) or (len(times) >= 3 and after - start >= 1.0):
            break
    times.sort()
    return times[0], times[len(times) // 2]


def measure_calls(task, tokens, call, copies):
    """call(i) is one product with weight i of `copies`."""
    group = task.group(tokens)

    def sample(s):
        for i in range(s * group, (s + 1) * group):
            call(i % copies)

    return measure(task.seconds, group, sample)


def print_version(what, version):
    print(json.dumps({"version_of": what, "version": version}), flush=True)


def print_cell(task, kernel, kind, direction, tokens, times, error):
    print(json.dumps({"kernel": kernel, "class": kind, "direction": direction, "out": task.out, "in": task.cols, "tokens": tokens,
                      "threads": task.threads, "us_min": float(f"{1e6 * times[0]:.5g}"), "us_median": float(f"{1e6 * times[1]:.5g}"),
                      "error": None if error is None else float(f"{error:.3g}")}), flush=True)


def busy():
    """Seconds of all processors that were not idle, less this process's own."""
    with open("/proc/stat") as file:
        parts = [int(x) for x in file.readline().split()[1:9]]
    return (sum(parts) - parts[3] - parts[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()


def start_torch(task):
    import torch

    torch.set_num_threads(task.threads)
    built_with = torch.__config__.show()
    libraries = [f"{name} {match[1]}" for name, match in (("MKL", re.search(r"Kernel Library Version ([\d.]+)", built_with)),
                                                           ("oneDNN", re.search(r"MKL-DNN v([\d.]+)", built_with))) if match]
    print_version("torch", ", ".join([torch.__version__] + libraries))
    return torch


def run_torch(task):
    torch = start_torch(task)
    from torch.nn.functional import linear

    weight = random_matrix(task.out, task.cols, 0.02, 1)
    x = random_matrix(max(task.tokens), task.cols, 1.0, 2)
    dy = random_matrix(max(task.tokens), task.out, 1.0, 3)
    with torch.inference_mode():
        for dtype, name, kind in ((torch.float32, "torch float32", "dense-float32"), (torch.bfloat16, "torch bfloat16", "16-bit")):
            one = torch.from_numpy(weight).to(dtype)
            weights = [one.clone() for _ in range(task.copies(one.nbytes))]
            plain = one.float().numpy()
            for direction, values, product, matrix in (("forward", x, linear, plain.T), ("backward", dy, torch.mm, plain)):
                reference = Reference(task, values, matrix)
                for tokens in task.tokens:
                    given = torch.from_numpy(values[:tokens]).to(dtype)
                    times = measure_calls(task, tokens, lambda i: product(given, weights[i]), len(weights))
                    print_cell(task, name, kind, direction, tokens, times, reference.error(product(given, weights[0]).float().numpy()))
                    if times[0] >= too_slow:
                        break
            del weights

        size = 64  # of a group of weights with one scale and one zero point
        codes = torch.randint(0, 16, (min(task.out, 512), task.cols), dtype=torch.int32)
        codes = codes.repeat(math.ceil(task.out / 512), 1)[: task.out].contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.stack([0.002 + 0.004 * torch.rand(task.cols // size, task.out),
                              0.01 * torch.randn(task.cols // size, task.out)], 2).to(torch.bfloat16).contiguous()
        weights = [packed.clone() for _ in range(task.copies(packed.nbytes + scales.nbytes))]
        scale, zero = (scales[:, :, part].float().T.repeat_interleave(size, 1) for part in (0, 1))
        reference = Reference(task, x, ((codes.float() - 8) * scale + zero).numpy().T)
        for tokens in task.tokens:
            given = torch.from_numpy(x[:tokens]).to(torch.bfloat16)
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
            times = measure_calls(task, tokens, lambda i: product(given, weights[i], size, scales), len(weights))
            print_cell(task, "torch int4 bfloat16", "16-bit", "forward", tokens, times,
                       reference.error(product(given, weights[0], size, scales).float().numpy()))


def run_bitsandbytes(task):
    torch = start_torch(task)
    import bitsandbytes as bnb

    print_version("bitsandbytes", bnb.__version__)
    weight = torch.from_numpy(random_matrix(task.out, task.cols, 0.02, 1))
    x = random_matrix(max(task.tokens), task.cols, 1.0, 2)
    dy = random_matrix(max(task.tokens), task.out, 1.0, 3)

    def layer(dtype):
        one = bnb.nn.Linear4bit(task.cols, task.out, bias=False, compute_dtype=dtype, quant_type="nf4")
        one.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        one = one.to("cpu")
        if one.weight.quant_state is None:
            one.weight._quantize("cpu")
        return one

    first = layer(torch.float32)
    plain = bnb.functional.dequantize_4bit(first.weight.data, first.weight.quant_state).float().numpy()
    forward, backward = Reference(task, x, plain.T), Reference(task, dy, plain)
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        kind = "float32" if name == "float32" else "16-bit"
        one = layer(dtype)
        count = task.copies(one.weight.data.numel() * 2.0 * dtype.itemsize)  # every call fills the caches with the decoded weight too
        layers = [one] + [copy.deepcopy(one) for _ in range(count - 1)]
        for each in layers:
            each.train()
        backward_too = True
        for tokens in task.tokens:
            given = torch.from_numpy(x[:tokens]).to(dtype).requires_grad_(True)
            gradient = torch.from_numpy(dy[:tokens]).to(dtype)
            times = measure_calls(task, tokens, lambda i: layers[i](given), count)
            print_cell(task, f"bitsandbytes train {name}", kind, "forward", tokens, times,
                       forward.error(layers[0](given).detach().float().numpy()))
            if times[0] >= too_slow:
                break
            if not backward_too:
                continue
            results = [each(given) for each in layers]

            def gradient_of(i):
                return torch.autograd.grad(results[i], given, gradient, retain_graph=True)[0]

            times = measure_calls(task, tokens, gradient_of, count)
            print_cell(task, f"bitsandbytes train {name}", kind, "backward", tokens, times, backward.error(gradient_of(0).float().numpy()))
            backward_too = times[0] < too_slow
            del results
        del layers

    with torch.inference_mode():
        one = layer(torch.bfloat16)
        count = task.copies(0.516 * task.out * task.cols)
        layers = [one] + [copy.deepcopy(one) for _ in range(count - 1)]
        for each in layers:
            each.eval()
            each(torch.zeros(1, task.cols, dtype=torch.bfloat16))  # repacks the weight where the processor has bfloat16 products
        for tokens in task.tokens:
            given = torch.from_numpy(x[:tokens]).to(torch.bfloat16)
            times = measure_calls(task, tokens, lambda i: layers[i](given), count)
            print_cell(task, "bitsandbytes eval bfloat16", "16-bit", "forward", tokens, times,
                       forward.error(layers[0](given).float().numpy()))


def run_quantize(task):
    torch = start_torch(task)
    import bitsandbytes as bnb

    functional = bnb.functional
    print_version("bitsandbytes", bnb.__version__)
    weight = torch.from_numpy(random_matrix(task.out, task.cols, 0.02, 1))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    times = measure(task.seconds, 1, lambda _: functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    decoded = functional.dequantize_4bit(codes, state)
    error = float((decoded - weight).double().norm() / weight.double().norm())
    print_cell(task, "bitsandbytes", "quantization", "quantize", 0, times, error)
    weights = [codes.clone() for _ in range(task.copies(codes.nbytes))]
    times = measure(task.seconds, 1, lambda i: functional.dequantize_4bit(weights[i % len(weights)], state))  # knows no out= here
    print_cell(task, "bitsandbytes", "quantization", "dequantize", 0, times, None)


def run_onnxruntime(task):
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    print_version("onnxruntime", ort.__version__)
    # One pool for all sessions: pools of their own would spin against each other.
    ort.set_global_thread_pool_sizes(task.threads, 1)
    rng = np.random.default_rng(1)
    size, x = 64, random_matrix(max(task.tokens), task.cols, 1.0, 2)
    fresh = min(task.out, 512)
    blocks = task.cols // size
    repeat = math.ceil(task.out / fresh)
    codes = np.tile(rng.integers(0, 256, (fresh, blocks, size // 2), dtype=np.uint8), (repeat, 1, 1))[: task.out]
    scales = np.tile((0.002 + 0.004 * rng.random((fresh, blocks))).astype(np.float32), (repeat, 1))[: task.out]
    low, high = (codes & 15), (codes >> 4)

    nf4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
    integers = np.stack([low, high], -1).astype(np.float32).reshape(task.out, blocks, size) - 8.0
    normal_floats = nf4[np.stack([high, low], -1)].reshape(task.out, blocks, size)

    def node(kind, i):
        if kind == "dense":
            return helper.make_node("MatMul", ["x", f"weight{i}"], [f"y{i}"])
        names = ["x", f"codes{i}", f"scales{i}"]
        common = {"domain": "com.microsoft", "K": task.cols, "N": task.out, "block_size": size}
        if kind == "nf4":
            return helper.make_node("MatMulBnb4", names, [f"y{i}"], quant_type=1, **common)
        return helper.make_node("MatMulNBits", names, [f"y{i}"], bits=4, accuracy_level=4 if kind == "int8" else 0, **common)

    def session(kind, arrays, depth, cols, group):
        weights = []
        for i in range(group):  # ONNX Runtime would keep one copy of equal weights
            for name, array in arrays.items():
                array = array.copy()
                array.flat[0] += i
                weights.append(onnx.numpy_helper.from_array(array, f"{name}{i}"))
        graph = helper.make_graph([node(kind, i) for i in range(group)], "products",
                                  [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", depth])],
                                  [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["tokens", cols]) for i in range(group)],
                                  weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(name, kind, cell_kind, direction, arrays, values, matrix):
        depth, cols = matrix.shape
        reference = Reference(task, values, matrix)
        sessions, built_for = [], 0
        for tokens in task.tokens:
            group = task.group(tokens)
            if group != built_for:
                sessions = []  # frees the last ones first
                count = math.ceil(task.copies(sum(array.nbytes for array in arrays.values())) / group)
                sessions, built_for = [session(kind, arrays, depth, cols, group) for _ in range(count)], group
            given = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values[:tokens]))
            targets = [ort.OrtValue.ortvalue_from_numpy(np.zeros((tokens, cols), np.float32)) for _ in range(group)]
            bindings = [each.io_binding() for each in sessions]
            for binding in bindings:
                binding.bind_ortvalue_input("x", given)
                for i, target in enumerate(targets):
                    binding.bind_ortvalue_output(f"y{i}", target)

            def sample(s):
                sessions[s % len(sessions)].run_with_iobinding(bindings[s % len(sessions)])

            times = measure(task.seconds, group, sample)
            print_cell(task, name, cell_kind, direction, tokens, times, reference.error(targets[0].numpy()))

    def decoded(values):
        return np.ascontiguousarray((values * scales[:, :, None]).reshape(task.out, task.cols).T)

    dense = random_matrix(task.out, task.cols, 0.02, 1)
    turned = np.ascontiguousarray(dense.T)
    stored, flat = {"codes": codes, "scales": scales}, {"codes": codes.reshape(-1), "scales": scales.reshape(-1)}
    dy = random_matrix(max(task.tokens), task.out, 1.0, 3)
    for arguments in (("ONNX Runtime float32", "dense", "dense-float32", "forward", {"weight": turned}, x, turned),
                      ("ONNX Runtime float32", "dense", "dense-float32", "backward", {"weight": dense}, dy, dense),
                      ("ONNX Runtime int4 float32", "float32", "float32", "forward", stored, x, decoded(integers)),
                      ("ONNX Runtime int4 int8", "int8", "int8", "forward", stored, x, decoded(integers)),
                      ("ONNX Runtime NF4 float32", "nf4", "float32", "forward", flat, x, decoded(normal_floats))):
        try:
            run(*arguments)
        except Exception as problem:  # a build of ONNX Runtime without this operator: go on without it
            print(f"{arguments[0]}: {str(problem).splitlines()[0][:160]}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 8:
        sys.exit(__doc__)
    run = {"torch": run_torch, "bitsandbytes": run_bitsandbytes, "onnxruntime": run_onnxruntime, "quantize": run_quantize}[sys.argv[1]]
    before, start = busy(), time.perf_counter()
    run(Task(*sys.argv[2:]))
    share = (busy() - before) / ((time.perf_counter() - start) * os.cpu_count())
    print(json.dumps({"others_percent": round(100 * max(0.0, share), 1)}), flush=True)
