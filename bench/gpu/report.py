"""gpu-<name>.json and gpu-<name>.md from the lines that gpu_bench, falcon_step and peers.py print.

python3 bench/gpu/report.py CELLS.jsonl [--out FOLDER] [--name NAME] [--bitsandbytes LIBRARY]

Exit status 1 where a result is wrong (an error against float64 that rounding to bfloat16 does not explain) or a step's memory is more
than 5 % off its plan; goals of speed that are missed are said, no more.
"""

import argparse
import datetime
import json
import math
import pathlib
import re
import sys


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def key(cell):
    return cell["out"], cell["in"], cell["tokens"]


def best_of_peer(cells):
    """The faster of bitsandbytes' two ways, of those that are right: what its own rules could choose at best."""
    right = (c for c in cells if c["who"].startswith("bitsandbytes") and c.get("error", 0) <= LARGEST_ERROR)
    return min(right, key=lambda c: c["us"], default=None)


def products(lines, op):
    """{(out, in, tokens): {"ours", "cublas", "bitsandbytes"}}"""
    groups = {}
    for cell in lines:
        if cell.get("op") == op:
            groups.setdefault(key(cell), []).append(cell)
    table = {}
    for at, cells in groups.items():
        by_name = {c["who"]: c for c in cells}
        if "ours" not in by_name or "cublas" not in by_name:
            continue  # of a run that was cut off
        table[at] = {"ours": by_name["ours"], "cublas": by_name["cublas"], "bitsandbytes": best_of_peer(cells)}
    return table


LARGEST_ERROR = 1e-2  # of products in bfloat16: 2^-9 for the code book, the activations and the result each
LARGEST_DEVIATION = 0.05  # of a step's memory from its plan
BYTES_PER_WEIGHT = 0.51587  # NF4 with double-quantized scales


def goals(lines, gpu):
    """[(what, at least, aim, found)]; found is None where nothing was measured. Speeds are geometric means over all shapes, errors and what
    adapters add the worst of them. Of goals that begin with "<" less is better."""
    forward, backward = products(lines, "forward"), products(lines, "backward")
    adapters, layers = by_key(lines, "adapter", "rank"), by_key(lines, "layer", "who")
    steps = [line["falcon_step"] for line in lines if "falcon_step" in line]

    def speed(tables, rival, least, most=math.inf, bytes_packed=0):
        return mean_or_none([c[rival]["us"] / c["ours"]["us"] for table in tables for (o, i, t), c in table.items()
                             if least <= t <= most and c[rival] is not None and o * i * BYTES_PER_WEIGHT >= bytes_packed])

    def error(most):
        return max((c["ours"]["error"] / c["bitsandbytes"]["error"] for table in (forward, backward) for (_, _, t), c in table.items()
                    if t <= most and c["bitsandbytes"] is not None), default=None)

    def overhead(rank):
        return max((100 * (us[rank] / us[0] - 1) for (_, _, t), us in adapters.items() if t == 1 and {0, rank} <= us.keys()), default=None)

    peft = mean_or_none([us["PEFT + bitsandbytes"] / us["ours"] for (_, _, t), us in layers.items()
                         if t == 2048 and "PEFT + bitsandbytes" in us and "ours" in us])
    batch = max((s["batch"] for s in steps if s["layers"] == 60 and s["cap_gib"] <= 32 and s["tokens"] == 512), default=None)
    one_token = (1.5, 2.0) if "H200" in gpu else (1.25, 1.5)
    return [("M=1, times as fast as bitsandbytes", *one_token, speed([forward], "bitsandbytes", 1, 1)),
            ("M=1, as cuBLAS in bfloat16, weights of 23 MB and more", 2.8, 3.4, speed([forward], "cublas", 1, 1, 23e6)),
            ("M=4-16, as bitsandbytes", 2.0, 3.5, speed([forward], "bitsandbytes", 4, 16)),
            ("M=32-256, as bitsandbytes", 1.8, 3.0, speed([forward], "bitsandbytes", 32, 256)),
            ("T=512-1024 forward, as bitsandbytes", 1.15, 1.4, speed([forward], "bitsandbytes", 512, 1024)),
            ("T=4096 and more, forward and dX, as cuBLAS in bfloat16", 0.95, 0.97, speed([forward, backward], "cublas", 4096)),
            ("a layer with rank 64, T=2048, as PEFT + bitsandbytes", 1.25, 1.5, peft),
            ("< M=1, what rank 64 adds, %", 20, 12, overhead(64)),
            ("< M=1, what rank 8 adds, %", 6, 3, overhead(8)),
            # Where both decode to the same bfloat16 weights, errors differ by the order of sums alone: by 2 %.
            ("< error against float64, of bitsandbytes', worst cell", 1.02, 1.0, error(math.inf)),
            ("< the same at M up to 8", 1.0, 0.7, error(8)),
            ("Falcon-40b's step in 32 GiB, batch of 512 tokens each", 4, 8, batch)]


def verdict(what, least, aim, found):
    if found is None:
        return "not measured"
    meets = (lambda goal: found <= goal) if what.startswith("<") else (lambda goal: found >= goal)
    return "aim reached" if meets(aim) else "reached" if meets(least) else "missed"


def wrong_cells(lines):
    return [c for c in lines if (c.get("who") == "ours" or c.get("op") == "kernel") and "error" in c and not c["error"] <= LARGEST_ERROR]


def beside_plan(lines):
    """Steps whose memory is not what was planned."""
    steps = [line["falcon_step"] for line in lines if "falcon_step" in line]
    return [s for s in steps if abs(s["peak_gb"] / s["planned_gb"] - 1) > LARGEST_DEVIATION]


def by_key(lines, op, name):
    """{(out, in, tokens): {cell[name]: microseconds}}"""
    groups = {}
    for cell in lines:
        if cell.get("op") == op:
            groups.setdefault(key(cell), {})[cell[name]] = cell["us"]
    return groups


def mean_or_none(values):
    return geometric_mean(values) if values else None


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
    machine = next((line["machine"] for line in lines if "machine" in line), None)
    if machine is None:
        sys.exit(f"{args.cells}: no line says what was measured on; nothing to report")
    ceilings = {line["ceiling"]: line.get("tb_s", line.get("tflop_s")) for line in lines if "ceiling" in line}
    name = args.name or re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    day = datetime.date.today().isoformat()
    speeds = [f"{what} {ceilings[what]:{digits}} {unit}" for what, digits, unit in
              (("copy", ".2f", "TB/s"), ("read", ".2f", "TB/s"), ("bfloat16", ".0f", "TFLOP/s")) if what in ceilings]
    text = [f"# {machine['gpu']}", "",
            f"{day}; compute capability {machine['capability']}, {machine['processors']} processors, L2 {machine['l2_bytes'] / 2**20:.0f} MiB, "
            f"driver {machine['driver']}, CUDA {machine['runtime']}, cuBLASLt {machine['cublaslt']}, clock {machine['clock_khz'] / 1000:.0f} MHz"
            + (f", {args.bitsandbytes}" if args.bitsandbytes else "") + ".", "",
            "Ceilings: " + (", ".join(speeds) or "not measured") + ".", "",
            "NF4 with double-quantized scales, bfloat16 activations; CUDA graphs, of products over weights that exceed the L2 cache, competitors "
            "in turns, medians. bitsandbytes is the faster of its fused kernel and decoding + cuBLAS in every cell; cuBLAS multiplies weights in "
            "bfloat16.", ""]
    text += ["## Goals", "", "| goal | at least | aim | found | |", "|---|---|---|---|---|"]
    for what, least, aim, found in goals(lines, machine["gpu"]):
        text.append(f"| {what} | {least:g} | {aim:g} | {'–' if found is None else f'{found:.2f}'} | {verdict(what, least, aim, found)} |")
    text.append("")
    for cell in wrong_cells(lines):
        text += [f"**Wrong: {cell['op']} {cell['out']}×{cell['in']}, M={cell['tokens']}, {cell['who']}: error {cell['error']:.1e}.**", ""]
    for op, title in (("forward", "Forward, y = x·Wᵀ"), ("backward", "Backward, dx = dy·W")):
        table = products(lines, op)
        if not table:
            continue
        text += [f"## {title}", ""] + error_lines(table)
        text += time_table(table, "Ours, µs (relative error)")
        text += ratio_table(table, "cublas", "Times as fast as cuBLAS in bfloat16")
        if any(cell["bitsandbytes"] for cell in table.values()):
            text += ratio_table(table, "bitsandbytes", "Times as fast as bitsandbytes")
    kernels = by_key(lines, "kernel", "who")
    if kernels:
        names = list(dict.fromkeys(name for us in kernels.values() for name in us))
        text += ["## Forward by each kernel, µs", "", "What `ProductLimits` should be; the fastest is bold.", "",
                 "| out × in | M | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
        for (o, i, t), us in kernels.items():
            found = [f"{us[name]:.1f}" if name in us else "–" for name in names]
            fastest = min(us.values())
            text.append(f"| {o}×{i} | {t} | " + " | ".join(f"**{f}**" if us.get(name) == fastest else f for name, f in zip(names, found)) + " |")
        text.append("")
    terms = {}
    for cell in lines:
        if cell.get("op") == "term":
            terms.setdefault(key(cell), {})[cell["forward"]] = 100 * cell["appended_us"] / cell["added_us"]
    if terms:
        text += ["## An adapter's term of rank 64 appended to the operands of slabs", "",
                 "In % of the time that products take to which it is added afterwards; `ProductLimits::augmented` says where it is appended.", "",
                 "| out × in | M | forward | backward |", "|---|---|---|---|"]
        for (o, i, t), of in sorted(terms.items(), key=lambda at: at[0][0] / at[0][1]):
            text.append(f"| {o}×{i} | {t} | " + " | ".join(f"{of[way]:.0f} %" if way in of else "–" for way in (True, False)) + " |")
        text.append("")
    adapters = by_key(lines, "adapter", "rank")
    if adapters:
        text += ["## What an adapter adds to a forward pass", "", "| out × in | M | rank 8 | rank 64 |", "|---|---|---|---|"]
        for (o, i, t), us in adapters.items():
            if not {0, 8, 64} <= us.keys():
                continue
            text.append(f"| {o}×{i} | {t} | {100 * (us[8] / us[0] - 1):.0f} % | {100 * (us[64] / us[0] - 1):.0f} % |")
        text.append("")
    layers = {}
    for cell in lines:
        if cell.get("op") == "layer":
            layers.setdefault(key(cell), []).append(cell)
    if layers:
        text += ["## A layer with an adapter of rank 64: forward, forward again, backward", "",
                 "All are CUDA graphs but PEFT's, which PyTorch launches call by call, ten passes queued at once.", "",
                 "| out × in | M | ours, µs | times as fast as bfloat16 | as bitsandbytes | as PEFT + bitsandbytes |",
                 "|---|---|---|---|---|---|"]
        for (o, i, t), cells in layers.items():
            by_name = {c["who"]: c["us"] for c in cells}
            if "ours" not in by_name or "cublas" not in by_name:
                continue
            peer, peft = best_of_peer(cells), by_name.get("PEFT + bitsandbytes")
            text.append(f"| {o}×{i} | {t} | {by_name['ours']:.0f} | {by_name['cublas'] / by_name['ours']:.2f} | "
                        + (f"{peer['us'] / by_name['ours']:.2f}" if peer else "–") + " | "
                        + (f"{peft / by_name['ours']:.2f}" if peft else "–") + " |")
        text.append("")
    steps = [line["falcon_step"] for line in lines if "falcon_step" in line]
    if steps:
        text += ["## A training step of Falcon-40b's shape", "",
                 "Adapters of rank 64 on all four linear layers of each block, ranks drawn from 1 to 64, activations recomputed, random weights; "
                 "all memory beyond the cap taken away beforehand. The step beside PEFT has rank 64 as PEFT's; ours recomputes all blocks but the "
                 "last one, PEFT that one too.", "",
                 "| blocks | batch | tokens each | moments | checkpoints on the | cap, GiB | planned, GB | peak, GB | reserved, GB | s a step "
                 "| PEFT + bitsandbytes, s |",
                 "|---|---|---|---|---|---|---|---|---|---|---|"]
        peers = [line["peer_step"] for line in lines if "peer_step" in line]
        for s in steps:
            peer = next((p for p in peers if all(p[k] == s[k] for k in ("layers", "batch", "tokens", "moments"))), None)
            text.append(f"| {s['layers']} | {s['batch']} | {s['tokens']} | {s['moments']} bits | "
                        f"{'host' if s['offload'] else 'device'} | {s['cap_gib']} | {s['planned_gb']:.2f} | {s['peak_gb']:.2f} | "
                        f"{s['reserved_gb']:.2f} | {s['median_s']:.2f} | "
                        + (f"{peer['median_s']:.2f}" if peer else "–") + " |")
        text.append("")
    for s in beside_plan(lines):
        text += [f"**Batch {s['batch']}, {s['layers']} blocks: {s['peak_gb']:.2f} GB are more than 5 % off the plan's "
                 f"{s['planned_gb']:.2f}.**", ""]
    for line in lines:
        if "falcon_step_failed" in line:
            text += [f"**A step of Falcon-40b's shape failed: {line['falcon_step_failed']}.**", ""]
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"date": day, "machine": machine, "ceilings": ceilings, "bitsandbytes": args.bitsandbytes,
              "goals": [dict(zip(("goal", "at_least", "aim", "found", "verdict"), (*g, verdict(*g))))
                        for g in goals(lines, machine["gpu"])],
              "cells": [line for line in lines if "op" in line], "falcon_steps": steps,
              "peer_steps": [line["peer_step"] for line in lines if "peer_step" in line]}
    (args.out / f"gpu-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / f"gpu-{name}.md").write_text("\n".join(text))
    print(f"wrote {args.out / f'gpu-{name}.md'} and .json")
    return 1 if wrong_cells(lines) or beside_plan(lines) else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "results")
    parser.add_argument("--name", default="")
    parser.add_argument("--bitsandbytes", default="")
    args = parser.parse_args()
    lines = []
    for line in args.cells.read_text().splitlines():
        if not line.startswith("{"):
            continue
        try:
            lines.append(json.loads(line))
        except ValueError:  # the last of a run that was cut off
            print(f"left out: {line[:100]}", file=sys.stderr)
    return write(lines, args)


if __name__ == "__main__":
    sys.exit(main())
