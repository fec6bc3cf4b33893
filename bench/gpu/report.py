"""gpu-<name>.json and gpu-<name>.md from the lines that gpu_bench prints.

python3 bench/gpu/report.py CELLS.jsonl [--out FOLDER] [--name NAME] [--bitsandbytes LIBRARY]
"""

import argparse
import datetime
import json
import math
import pathlib
import re


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def key(cell):
    return cell["out"], cell["in"], cell["tokens"]


def best_of_peer(cells):
    """The faster of bitsandbytes' two ways: what its own rules could choose at best."""
    return min((c for c in cells if c["who"].startswith("bitsandbytes")), key=lambda c: c["us"], default=None)


def products(lines, op):
    """{(out, in, tokens): {"ours", "cublas", "bitsandbytes"}}"""
    groups = {}
    for cell in lines:
        if cell.get("op") == op:
            groups.setdefault(key(cell), []).append(cell)
    table = {}
    for at, cells in groups.items():
        by_name = {c["who"]: c for c in cells}
        table[at] = {"ours": by_name["ours"], "cublas": by_name["cublas"], "bitsandbytes": best_of_peer(cells)}
    return table


def ratio_table(table, rival, title):
    tokens = sorted({t for _, _, t in table})
    shapes = list(dict.fromkeys((o, i) for o, i, _ in table))
    out = [f"### {title}", "", "| out × in | " + " | ".join(f"M={t}" for t in tokens) + " |", "|---|" + "---|" * len(tokens)]
    ratios = {t: [] for t in tokens}
    for shape in shapes:
        row = [f"{shape[0]}×{shape[1]}"]
        for t in tokens:
            cell = table.get((*shape, t))
            if cell is None or cell[rival] is None:
                row.append("–")
                continue
            ratio = cell[rival]["us"] / cell["ours"]["us"]
            ratios[t].append(ratio)
            row.append(f"{ratio:.2f}")
        out.append("| " + " | ".join(row) + " |")
    out.append("| geometric mean | " + " | ".join(f"**{geometric_mean(ratios[t]):.2f}**" if ratios[t] else "–" for t in tokens) + " |")
    every = [r for all_of in ratios.values() for r in all_of]
    if every:
        out += ["", f"All cells: geometric mean {geometric_mean(every):.2f}, worst {min(every):.2f}, "
                    f"{sum(r >= 1 / 1.03 for r in every)} of {len(every)} at least level within 3 %."]
    return out + [""]


def time_table(table, title):
    tokens = sorted({t for _, _, t in table})
    shapes = list(dict.fromkeys((o, i) for o, i, _ in table))
    out = [f"### {title}", "", "| out × in | " + " | ".join(f"M={t}" for t in tokens) + " |", "|---|" + "---|" * len(tokens)]
    for shape in shapes:
        row = [f"{shape[0]}×{shape[1]}"]
        for t in tokens:
            cell = table.get((*shape, t))
            row.append("–" if cell is None else f"{cell['ours']['us']:.1f} ({cell['ours']['error']:.1e})")
        out.append("| " + " | ".join(row) + " |")
    return out + [""]


def error_lines(table):
    with_peer = [c for c in table.values() if c["bitsandbytes"] is not None]
    out = [f"Relative error against float64: ours {min(c['ours']['error'] for c in table.values()):.1e} to "
           f"{max(c['ours']['error'] for c in table.values()):.1e}"]
    if with_peer:
        worse = sum(c["ours"]["error"] > 1.02 * c["bitsandbytes"]["error"] for c in with_peer)
        out[0] += (f"; bitsandbytes {min(c['bitsandbytes']['error'] for c in with_peer):.1e} to "
                   f"{max(c['bitsandbytes']['error'] for c in with_peer):.1e}; ours is larger by more than 2 % in {worse} of {len(with_peer)} cells")
    return [out[0] + ".", ""]


def write(lines, args):
    machine = next(line["machine"] for line in lines if "machine" in line)
    ceilings = {line["ceiling"]: line.get("tb_s", line.get("tflop_s")) for line in lines if "ceiling" in line}
    name = args.name or re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    day = datetime.date.today().isoformat()
    text = [f"# {machine['gpu']}", "",
            f"{day}; compute capability {machine['capability']}, {machine['processors']} processors, L2 {machine['l2_bytes'] / 2**20:.0f} MiB, "
            f"driver {machine['driver']}, CUDA {machine['runtime']}, cuBLASLt {machine['cublaslt']}, clock {machine['clock_khz'] / 1000:.0f} MHz"
            + (f", {args.bitsandbytes}" if args.bitsandbytes else "") + ".", "",
            f"Ceilings: copy {ceilings['copy']:.2f} TB/s, read {ceilings['read']:.2f} TB/s, bfloat16 {ceilings['bfloat16']:.0f} TFLOP/s.", "",
            "NF4 with double-quantized scales, bfloat16 activations; CUDA graphs over weights that exceed the L2 cache, competitors in turns, "
            "medians. bitsandbytes is the faster of its fused kernel and decoding + cuBLAS in every cell; cuBLAS multiplies weights in bfloat16.", ""]
    for op, title in (("forward", "Forward, y = x·Wᵀ"), ("backward", "Backward, dx = dy·W")):
        table = products(lines, op)
        if not table:
            continue
        text += [f"## {title}", ""] + error_lines(table)
        text += time_table(table, "Ours, µs (relative error)")
        text += ratio_table(table, "cublas", "Times as fast as cuBLAS in bfloat16")
        if any(cell["bitsandbytes"] for cell in table.values()):
            text += ratio_table(table, "bitsandbytes", "Times as fast as bitsandbytes")
    adapters = {}
    for cell in lines:
        if cell.get("op") == "adapter":
            adapters.setdefault(key(cell), {})[cell["rank"]] = cell["us"]
    if adapters:
        text += ["## What an adapter adds to a forward pass", "", "| out × in | M | rank 8 | rank 64 |", "|---|---|---|---|"]
        for (o, i, t), us in adapters.items():
            text.append(f"| {o}×{i} | {t} | {100 * (us[8] / us[0] - 1):.0f} % | {100 * (us[64] / us[0] - 1):.0f} % |")
        text.append("")
    layers = {}
    for cell in lines:
        if cell.get("op") == "layer":
            layers.setdefault(key(cell), []).append(cell)
    if layers:
        text += ["## A layer with an adapter of rank 64: forward, forward again, backward", "",
                 "| out × in | M | ours, µs | times as fast as bfloat16 | as bitsandbytes |", "|---|---|---|---|---|"]
        for (o, i, t), cells in layers.items():
            by_name = {c["who"]: c["us"] for c in cells}
            peer = best_of_peer(cells)
            text.append(f"| {o}×{i} | {t} | {by_name['ours']:.0f} | {by_name['cublas'] / by_name['ours']:.2f} | "
                        + (f"{peer['us'] / by_name['ours']:.2f}" if peer else "–") + " |")
        text.append("")
    steps = [line["falcon_step"] for line in lines if "falcon_step" in line]
    if steps:
        text += ["## A training step of Falcon-40b's shape", "",
                 "Adapters of rank 64 on all four linear layers of each block, ranks drawn from 1 to 64, activations recomputed, random weights; "
                 "all memory beyond the cap taken away beforehand.", "",
                 "| blocks | batch | tokens each | moments | cap, GiB | planned, GB | peak, GB | s a step |", "|---|---|---|---|---|---|---|---|"]
        for s in steps:
            text.append(f"| {s['layers']} | {s['batch']} | {s['tokens']} | {s['moments']} bits | {s['cap_gib']} | {s['planned_gb']:.2f} | "
                        f"{s['peak_gb']:.2f} | {s['median_s']:.2f} |")
        text.append("")
    for line in lines:
        if "falcon_step_failed" in line:
            text += [f"**A step of Falcon-40b's shape failed: {line['falcon_step_failed']}.**", ""]
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"date": day, "machine": machine, "ceilings": ceilings, "bitsandbytes": args.bitsandbytes,
              "cells": [line for line in lines if "op" in line], "falcon_steps": steps}
    (args.out / f"gpu-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / f"gpu-{name}.md").write_text("\n".join(text))
    print(f"wrote {args.out / f'gpu-{name}.md'} and .json")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "results")
    parser.add_argument("--name", default="")
    parser.add_argument("--bitsandbytes", default="")
    args = parser.parse_args()
    write([json.loads(line) for line in args.cells.read_text().splitlines() if line.strip()], args)


if __name__ == "__main__":
    main()
