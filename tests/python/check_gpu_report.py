"""bench/gpu/report.py on cells of which it is known what they mean: goals, wrong results, memory beside its plan."""
import json
import pathlib
import subprocess
import sys

folder = pathlib.Path(sys.argv[1])
report = pathlib.Path(__file__).parents[2] / "bench" / "gpu" / "report.py"


def cells(ours_us=10.0, ours_error=1e-3, peak=30.0, gpu="NVIDIA H100 80GB HBM3"):
    lines = [{"machine": {"gpu": gpu, "capability": "9.0", "processors": 132, "l2_bytes": 52428800, "driver": 13000, "runtime": 13000,
                          "cublaslt": 130000, "clock_khz": 1980000}}]
    lines += [{"ceiling": "copy", "tb_s": 3.0}, {"ceiling": "read", "tb_s": 3.1}, {"ceiling": "bfloat16", "tflop_s": 790.0}]
    for op in ("forward", "backward"):
        for out, inputs in ((4096, 4096), (32768, 8192)):
            for tokens in (1, 16, 128, 512, 4096):
                cell = {"op": op, "out": out, "in": inputs, "tokens": tokens}
                lines.append({**cell, "who": "ours", "us": ours_us, "error": ours_error})
                lines.append({**cell, "who": "cublas", "us": 35.0 if out == 32768 else 9.6, "error": 1e-3})
                lines.append({**cell, "who": "bitsandbytes, fused", "us": 18.0 if out == 32768 else 8.0, "error": 2e-3})
                lines.append({**cell, "who": "bitsandbytes, decoded", "us": 50.0, "error": 2e-3})
    for rank, us in ((0, 10.0), (8, 10.5), (64, 13.0)):
        lines.append({"op": "adapter", "out": 4096, "in": 4096, "tokens": 1, "rank": rank, "us": us})
    for out, forward, appended in ((4096, True, 11.0), (4096, False, 10.5), (8192, True, 9.3)):
        lines.append({"op": "term", "out": out, "in": 4096, "tokens": 512, "forward": forward, "appended_us": appended, "added_us": 10.0})
    for who, us in (("ours", 100.0), ("cublas", 90.0), ("PEFT + bitsandbytes", 140.0)):
        lines.append({"op": "layer", "out": 4096, "in": 4096, "tokens": 2048, "who": who, "us": us})
    step = {"layers": 60, "batch": 4, "tokens": 512, "moments": 32, "offload": 0, "cap_gib": 32, "planned_gb": 30.0,
            "peak_gb": peak, "reserved_gb": 30.5, "median_s": 5.0}
    return lines + [{"falcon_step": step}, {"peer_step": {"layers": 60, "batch": 4, "tokens": 512, "moments": 32, "median_s": 7.5}}]


def run(lines, end="\n"):
    file = folder / "cells.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + end)
    done = subprocess.run([sys.executable, str(report), str(file), "--out", str(folder), "--name", "test"], stdout=subprocess.PIPE)
    record = json.loads((folder / "gpu-test.json").read_text())
    return done.returncode, {g["goal"]: g for g in record["goals"]}, (folder / "gpu-test.md").read_text()


def close(found, expected):
    assert abs(found - expected) < 1e-9, (found, expected)


status, goals, text = run(cells())
assert status == 0, status
one_token = goals["M=1, times as fast as bitsandbytes"]
close(one_token["found"], (1.8 * 0.8) ** 0.5)  # the faster of bitsandbytes' two ways, over two shapes
assert one_token["verdict"] == "missed"
large = goals["M=1, as cuBLAS in bfloat16, weights of 23 MB and more"]
close(large["found"], 3.5)
assert large["verdict"] == "aim reached"
long = goals["T=4096 and more, forward and dX, as cuBLAS in bfloat16"]
close(long["found"], (3.5 * 0.96) ** 0.5)
layer = goals["a layer with rank 64, T=2048, as PEFT + bitsandbytes"]
close(layer["found"], 1.4)
assert layer["verdict"] == "reached"
assert goals["< M=1, what rank 64 adds, %"]["verdict"] == "missed"
assert goals["< M=1, what rank 8 adds, %"]["verdict"] == "reached"
assert goals["< error against float64, of bitsandbytes', worst cell"]["verdict"] == "aim reached"
assert goals["Falcon-40b's step in 32 GiB, batch of 512 tokens each"]["verdict"] == "reached"
assert "| 5.00 | 7.50 |" in text
assert "| 4096×4096 | 512 | 110 % | 105 % |" in text and "| 8192×4096 | 512 | 93 % | – |" in text
assert "Wrong" not in text

status, goals, text = run(cells(ours_us=5.0, gpu="NVIDIA H200"))  # its goal is another one
close(goals["M=1, times as fast as bitsandbytes"]["at_least"], 1.5)
assert goals["M=1, times as fast as bitsandbytes"]["verdict"] == "aim reached"

status, goals, text = run(cells(ours_error=1e30))  # what was no number
assert status == 1 and "**Wrong: forward 4096×4096, M=1" in text
assert goals["< the same at M up to 8"]["verdict"] == "missed"

status, goals, text = run(cells(peak=27.0))
assert status == 1 and "more than 5 % off the plan's 30.00" in text

status, goals, text = run([c for c in cells() if "bitsandbytes" not in c.get("who", "")])
assert status == 0 and goals["M=4-16, as bitsandbytes"]["verdict"] == "not measured"

# What a run that was cut off has left: no ceilings, a cell without cuBLAS, half a line.
left = [c for c in cells() if "ceiling" not in c][:4]
assert [c.get("who") for c in left[1:]] == ["ours", "cublas", "bitsandbytes, fused"]
status, goals, text = run(left + [{**left[1], "tokens": 16}], '\n{"op": "forward", "out": 40')
assert status == 0 and "Ceilings: not measured." in text
close(goals["M=1, times as fast as bitsandbytes"]["found"], 0.8)
assert goals["M=4-16, as bitsandbytes"]["verdict"] == "not measured"
