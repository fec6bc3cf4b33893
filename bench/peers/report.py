"""Gathers what the programs of run.sh print into cpu.json, and writes cpu.md and cpu.svg from that. Needs Python alone.

usage: report.py start RAW OPTIONS          the first line of a sitting's raw file: the machine, the date
       report.py add RAW FOLDER yes|no      the fastest of all rounds into FOLDER/cpu.json; yes: forget what stands there
       report.py render FOLDER              FOLDER/cpu.md and FOLDER/cpu.svg
"""
import datetime
import json
import math
import os
import sys

FLAGS = ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
         "amx_tile", "amx_int8", "amx_bf16"]
CLASSES = ["float32", "16-bit", "int8"]
ORDER = ["dense-float32"] + CLASSES
OURS = {"float32": "qdylora float32", "16-bit": "qdylora 16-bit", "int8": "qdylora int8"}


def read(path, default=""):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return default


def cpu_time():
    return [int(x) for x in read("/proc/stat", "cpu 0 0 0 0 0 0 0 0").splitlines()[0].split()[1:9]]


def start(raw, options):
    fields = {}
    for line in read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    memory = read("/proc/meminfo").split()
    huge = read("/sys/kernel/mm/transparent_hugepage/enabled")
    level3 = read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    machine = {
        "cpu": f"{fields.get('model name', 'unknown')}, family {fields.get('cpu family', '?')} model {fields.get('model', '?')}",
        "processors": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "level 3 cache": level3,
        "memory GiB": round(int(memory[1]) / 2**20) if len(memory) > 1 else None,
        "huge pages": huge[huge.find("[") + 1: huge.find("]")] if "[" in huge else "unknown",
    }
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    with open(raw, "a") as file:
        print(json.dumps({"sitting": {"date": now, "options": options}, "machine": machine, "cpu_time": cpu_time()}), file=file)


def key(cell):
    return tuple(cell.get(name) for name in ("kernel", "direction", "out", "in", "tokens", "threads"))


def add(raw, folder, fresh):
    path = os.path.join(folder, "cpu.json")
    head, versions, cells, others = None, {}, {}, []
    for line in read(raw).splitlines():
        row = json.loads(line)
        if "sitting" in row:
            head = row
        elif "version_of" in row:
            versions[row["version_of"]] = row["version"]
        elif "others_percent" in row:
            others.append(row["others_percent"])
        elif key(row) not in cells:
            cells[key(row)] = row
        else:  # the fastest of all rounds
            known = cells[key(row)]
            for name, better in (("us_min", min), ("us_median", min), ("tokens_per_s", max), ("tokens_per_s_median", max)):
                if name in row:
                    known[name] = better(known[name], row[name])
    spent = [now - before for now, before in zip(cpu_time(), head["cpu_time"])]
    sitting = dict(head["sitting"], stolen_percent=round(100 * spent[7] / max(1, sum(spent)), 1),
                   others_percent=[round(sum(others) / max(1, len(others)), 1), max(others, default=0)])
    data = {"machine": head["machine"], "sittings": [], "versions": {}, "cells": []}
    old = json.loads(read(path, "null"))
    if old and fresh == "no":
        if old["machine"]["cpu"] == data["machine"]["cpu"]:
            data.update(sittings=old["sittings"], versions=old["versions"], cells=[cell for cell in old["cells"] if key(cell) not in cells])
        else:
            print(f"{path} is of another processor and is replaced")
    for cell in cells.values():
        cell["sitting"] = len(data["sittings"])
    data["sittings"].append(sitting)
    data["versions"].update(versions)
    data["cells"] += cells.values()
    kept = sorted({cell["sitting"] for cell in data["cells"]})
    data["sittings"] = [data["sittings"][i] for i in kept]
    for cell in data["cells"]:
        cell["sitting"] = kept.index(cell["sitting"])
    with open(path + ".part", "w") as file:  # a cell to a line
        file.write("{\n")
        for name in ("machine", "sittings", "versions"):
            file.write(f'"{name}": {json.dumps(data[name], ensure_ascii=False)},\n')
        file.write('"cells": [\n' + ",\n".join(json.dumps(cell, ensure_ascii=False) for cell in data["cells"]) + "\n]\n}\n")
    os.replace(path + ".part", path)


def number(x):
    return f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def error_text(x):
    return "" if x is None else f" {x:.0e}".replace("e-0", "e-")


class Cells:
    def __init__(self, data):
        self.products = [cell for cell in data["cells"] if cell["direction"] in ("forward", "backward")]
        self.time = {key(cell): cell["us_min"] for cell in self.products}
        self.kind = {cell["kernel"]: cell["class"] for cell in self.products}
        self.tokens = sorted({cell["tokens"] for cell in self.products})
        self.places = []  # (out, in, threads), largest weights first as they were measured
        for cell in self.products:
            place = (cell["out"], cell["in"], cell["threads"])
            if place not in self.places:
                self.places.append(place)
        self.places.sort(key=lambda place: (-min(place[:2]) // 1024, place[0] * place[1], place))

    def at(self, kernel, direction, place, tokens):
        return self.time.get((kernel, direction, place[0], place[1], tokens, place[2]))

    def best(self, kinds, direction, place, tokens, peers_alone=True):
        """(time, kernel) of the fastest peer of these classes, or (None, None)."""
        found = [(self.at(name, direction, place, tokens), name) for name, kind in self.kind.items()
                 if kind in kinds and not (peers_alone and name.startswith("qdylora"))]
        return min([pair for pair in found if pair[0]], default=(None, None))

    def ratios(self, kind, direction, place, tokens):
        """(to the best dense float32, to the best peer of the class, who that is); None where something was not measured."""
        ours = self.at(OURS[kind], direction, place, tokens)
        dense, _ = self.best(["dense-float32"], direction, place, tokens)
        peer, who = self.best(["dense-float32", "float32"] if kind == "float32" else [kind], direction, place, tokens)
        return (dense / ours if ours and dense else None), (peer / ours if ours and peer else None), who


def place_text(place):
    return f"{place[0]}×{place[1]}, {place[2]} thread{'s' if place[2] != 1 else ''}"


SHORT = {"bitsandbytes": "bnb", "ONNX Runtime": "ORT", "bfloat16": "bf16", "float32": "f32"}


def short(name):
    for long, brief in SHORT.items():
        name = name.replace(long, brief)
    return name


def summary(cells, lines):
    lines += ["## Where we stand", "",
              "Speed of ours relative to the best dense float32 library, and to the fastest peer of the same class (for float32 the dense",
              "libraries are peers too). Above 1: ours is faster. Least over all shapes, threads and numbers of tokens:", "",
              "| class | direction | least to dense float32 | least to the best peer of its class | cells behind that peer |",
              "|---|---|---|---|---|"]
    tables = []
    for kind in CLASSES:
        for direction in ("forward", "backward"):
            found = {(place, tokens): cells.ratios(kind, direction, place, tokens) for place in cells.places for tokens in cells.tokens}
            found = {where: r for where, r in found.items() if r[0] or r[1]}
            if not found:
                continue
            to_dense = min((r[0], where) for where, r in found.items() if r[0]) if any(r[0] for r in found.values()) else None
            with_peer = [(r[1], where, r[2]) for where, r in found.items() if r[1]]
            to_peer = min(with_peer) if with_peer else None
            where_text = lambda where: f"{place_text(where[0])}, M={where[1]}"
            lines.append(f"| {kind} | {direction} | " + (f"{to_dense[0]:.2f} ({where_text(to_dense[1])})" if to_dense else "–") + " | " +
                         (f"{to_peer[0]:.2f} ({short(to_peer[2])}; {where_text(to_peer[1])})" if to_peer else "no such peer") + " | " +
                         (f"{sum(r[0] < 1 for r in with_peer)} of {len(with_peer)}" if with_peer else "–") + " |")
            tables.append((kind, direction, found))
    for kind, direction, found in tables:
        lines += ["", f"**{OURS[kind]}, {direction}**: to dense float32 / to the best peer of the class (who)." +
                  (" Bold: the least of its column." if len({place for place, _ in found}) > 1 else ""),
                  "", "| [out×in] | " + " | ".join(f"M={m}" for m in cells.tokens) + " |", "|---" * (len(cells.tokens) + 1) + "|"]
        several = len({place for place, _ in found}) > 1
        least = {m: [min((r[part] for (_, tokens), r in found.items() if tokens == m and r[part]), default=None) for part in (0, 1)]
                 for m in cells.tokens}
        for place in cells.places:
            if not any(where[0] == place for where in found):
                continue
            row = []
            for m in cells.tokens:
                if (place, m) not in found:
                    row.append("")
                    continue
                ratios = found[place, m]
                text = ["–" if r is None else f"**{r:.2f}**" if several and r == least[m][part] else f"{r:.2f}"
                        for part, r in enumerate(ratios[:2])]
                row.append(" / ".join(text) + (f" {short(ratios[2])}" if ratios[2] else ""))
            lines.append(f"| {place_text(place)} | " + " | ".join(row) + " |")
    lines.append("")


def full_tables(cells, data, lines):
    lines += ["## Every kernel", "",
              "Least µs of one product (speed relative to the best dense float32 of that column) relative error."]
    errors = {key(cell): cell["error"] for cell in cells.products}
    for direction, formula in (("forward", "y = x·Wᵀ"), ("backward", "dx = dy·W")):
        for place in cells.places:
            kernels = [name for name in cells.kind if any(cells.at(name, direction, place, m) for m in cells.tokens)]
            if not kernels:
                continue
            kernels.sort(key=lambda name: (ORDER.index(cells.kind[name]), not name.startswith("qdylora")))
            tokens = [m for m in cells.tokens if any(cells.at(name, direction, place, m) for name in kernels)]
            lines += ["", f"### {direction} {formula}, W {place_text(place)}", "",
                      "| kernel | class | " + " | ".join(f"M={m}" for m in tokens) + " |", "|---" * (len(tokens) + 2) + "|"]
            for name in kernels:
                row = []
                for m in tokens:
                    time, (dense, best) = cells.at(name, direction, place, m), cells.best(["dense-float32"], direction, place, m)
                    if not time:
                        row.append("")
                        continue
                    ratio = "" if not dense else " (best)" if name == best else f" ({dense / time:.2f})"
                    row.append(number(time) + ratio + error_text(errors[name, direction, place[0], place[1], m, place[2]]))
                bold = "**" if name.startswith("qdylora") else ""
                lines.append(f"| {bold}{name}{bold} | {cells.kind[name]} | " + " | ".join(row) + " |")
    lines.append("")


def other_tables(data, lines):
    quantization = [cell for cell in data["cells"] if cell["class"] == "quantization"]
    if quantization:
        columns = sorted({(cell["out"], cell["in"], cell["threads"]) for cell in quantization}, key=lambda c: (-c[0] * c[1], c[2]))
        lines += ["## Quantizing to NF4 with double-quantized scales, and decoding to float32", "",
                  "Million weights a second (ratio to bitsandbytes); of quantizing the relative root-mean-square error",
                  "of the decoded weights.", "",
                  "| | " + " | ".join(place_text(c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
        at = {(cell["kernel"], cell["direction"], cell["out"], cell["in"], cell["threads"]): cell for cell in quantization}
        for direction in ("quantize", "dequantize"):
            for kernel in ("qdylora", "bitsandbytes"):
                row = []
                for column in columns:
                    cell, peer = at.get((kernel, direction, *column)), at.get(("bitsandbytes", direction, *column))
                    if not cell:
                        row.append("")
                        continue
                    ratio = f" ({peer['us_min'] / cell['us_min']:.2f})" if peer and kernel == "qdylora" else ""
                    error = "" if cell["error"] is None else f" {cell['error']:.4f}"
                    row.append(number(column[0] * column[1] / cell["us_min"]) + ratio + error)
                lines.append(f"| {direction}, {kernel} | " + " | ".join(row) + " |")
        lines.append("")
    decoding = [cell for cell in data["cells"] if cell["class"] == "decode"]
    if decoding:
        threads = sorted({cell["threads"] for cell in decoding})
        at = {(cell["kernel"], cell["threads"]): cell for cell in decoding}
        lines += ["## Decoding", "",
                  "SmolLM2-135M-Instruct, one sequence, greedy, 128 tokens after one: tokens a second, the fastest of the runs",
                  "(the median of five).",
                  "llama.cpp runs the Q4_1 file as it is, and requantized to Q4_0, which it repacks for the processor.", "",
                  "| | " + " | ".join(f"{t} thread{'s' if t != 1 else ''}" for t in threads) + " |", "|---" * (len(threads) + 1) + "|"]
        for kernel in dict.fromkeys(cell["kernel"] for cell in decoding):
            row = [at.get((kernel, t)) for t in threads]
            lines.append(f"| {kernel} | " + " | ".join(
                f"{number(c['tokens_per_s'])} ({number(c['tokens_per_s_median'])})" if c else "" for c in row) + " |")
        lines.append("")


def picture(cells):
    """Speed relative to the best dense float32 against tokens, at the largest number of threads, as SVG. None without such cells."""
    place = max((p for p in cells.places if p[:2] == (4096, 4096)), key=lambda p: p[2], default=None)
    if place is None or len(cells.tokens) < 2:
        return None
    panels = []
    for direction in ("forward", "backward"):
        series = []
        for kind in CLASSES:
            ours, peers = [], []
            for m in cells.tokens:
                dense, _ = cells.best(["dense-float32"], direction, place, m)
                mine = cells.at(OURS[kind], direction, place, m)
                peer, who = cells.best([kind], direction, place, m)
                if dense and mine:
                    ours.append((m, dense / mine, OURS[kind]))
                if dense and peer:
                    peers.append((m, dense / peer, who))
            series += [(kind, True, ours), (kind, False, peers)]
        panels.append((direction, [s for s in series if s[2]]))
    values = [point[1] for _, series in panels for s in series for point in s[2]] + [1.0]
    low, high = math.floor(math.log2(min(values)) - 0.1), math.ceil(math.log2(max(values)) + 0.1)
    width, height, left, top, wide, tall, gap = 1040, 430, 62, 92, 430, 280, 66
    first, last = math.log2(cells.tokens[0]), math.log2(cells.tokens[-1])
    y_of = lambda v: top + tall * (high - math.log2(v)) / (high - low)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
           "<title>Speed relative to the best dense float32 library</title>",
           """<style>
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #1f2733; font-size: 12.5px }
.title { font-size: 16px; font-weight: 600 } .tick { font-size: 12px; fill: #5a6473 }
.card { fill: #ffffff; stroke: #d9dee5 } .grid { stroke: #e8ebef } .one { stroke: #5a6473; stroke-width: 1.6 }
.line { fill: none; stroke-width: 2.4; stroke-linejoin: round } .peer { stroke-dasharray: 6 5; stroke-width: 1.8 }
.c0 { stroke: #2f74d0 } .c1 { stroke: #1f9d78 } .c2 { stroke: #e0702b } .f0 { fill: #2f74d0 } .f1 { fill: #1f9d78 } .f2 { fill: #e0702b }
@media (prefers-color-scheme: dark) {
text { fill: #e6eaf0 } .tick { fill: #98a3b3 } .card { fill: #14181f; stroke: #2c333d } .grid { stroke: #252b34 } .one { stroke: #98a3b3 }
}
</style>""",
           f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
           f'<text class="title" x="{left}" y="30">Speed relative to the best dense float32 library, '
           f'weights {place_text(place)}</text>']
    x = left
    for i, kind in enumerate(CLASSES):
        for mine in (True, False):
            if not any(s[0] == kind and s[1] == mine for _, series in panels for s in series):
                continue
            text = OURS[kind] if mine else "best 4-bit float32 peer" if kind == "float32" else f"best {kind} peer"
            out.append(f'<line class="line c{i}{"" if mine else " peer"}" x1="{x}" y1="52" x2="{x + 26}" y2="52"/>'
                       f'<text x="{x + 32}" y="56">{text}</text>')
            x += 48 + 7 * len(text)
    for p, (direction, series) in enumerate(panels):
        origin = left + p * (wide + gap)
        x_of = lambda m: origin + 14 + (wide - 28) * (math.log2(m) - first) / (last - first)
        out.append(f'<text x="{origin}" y="{top - 10}">{direction}</text>')
        for power in range(low, high + 1):
            y = y_of(2.0**power)
            label = f"{2**power}×" if power >= 0 else f"1/{2**-power}×"
            out.append(f'<line class="{"one" if power == 0 else "grid"}" x1="{origin}" y1="{y:.1f}" x2="{origin + wide}" y2="{y:.1f}"/>'
                       f'<text class="tick" x="{origin - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for m in cells.tokens:
            out.append(f'<text class="tick" x="{x_of(m):.1f}" y="{top + tall + 20}" text-anchor="middle">{m}</text>')
        out.append(f'<text class="tick" x="{origin + wide / 2}" y="{top + tall + 42}" text-anchor="middle">tokens M</text>')
        for kind, mine, points in sorted(series, key=lambda s: s[1]):
            i = CLASSES.index(kind)
            path = " ".join(f"{x_of(m):.1f},{y_of(v):.1f}" for m, v, _ in points)
            out.append(f'<polyline class="line c{i}{"" if mine else " peer"}" points="{path}"/>')
            for m, v, who in points:
                out.append(f'<circle class="f{i}" cx="{x_of(m):.1f}" cy="{y_of(v):.1f}" r="{4 if mine else 2.6}">'
                           f"<title>{who}, M={m}: {v:.2f}×</title></circle>")
    return "\n".join(out + ["</svg>", ""])


def render(folder):
    data = json.loads(read(os.path.join(folder, "cpu.json"), "null"))
    if not data:
        sys.exit(f"{folder}/cpu.json is not there: run the benchmark first")
    cells, machine = Cells(data), data["machine"]
    lines = ["# CPU products beside the peers'", "",
             "Written by `bash bench/peers/run.sh`; the numbers are in [cpu.json](cpu.json).", "",
             f"* Machine: {machine['cpu']}, {machine['processors']} processors, level 3 cache {machine['level 3 cache']}, "
             f"{machine['memory GiB']} GiB; {' '.join(machine['flags'])}; huge pages: {machine['huge pages']}."]
    lines += [f"* Measured {s['date']}" + (f" with `{s['options']}`" if s["options"] else "") +
              f"; the host took {s['stolen_percent']} % of the processors, other programs {s['others_percent'][0]} % (at most "
              f"{s['others_percent'][1]} % while one program ran)." for s in data["sittings"]]
    if len(data["sittings"]) > 1:
        lines.append("* The cells are of several sittings; only ratios inside one carry over to another day.")
    lines += ["* " + "; ".join(f"{name} {version}" if not version.startswith(name) else version
                               for name, version in data["versions"].items()) + ".",
              "* Every number is the least of many runs (at least 5, or a second), over weights cycled through more bytes than the caches",
              "  hold. Programs run one after another for each shape and number of threads, rounds alternately forwards and backwards.",
              "  Of small weights up to 16 products in a row are timed together; peers that run graphs run them as one graph.",
              "* Errors are relative root-mean-square errors against double arithmetic on the kernel's own decoded weights and float32",
              "  activations: they hold the rounding of activations and results, not that of the weights to 4 bits (or to bfloat16, where",
              "  a dense weight is one).",
              "* bfloat16 peers are given bfloat16; ours, ONNX Runtime and ggml are given float32 and return float32.",
              "* malloc is told to keep large blocks: without that, bitsandbytes' training products of large weights, which decode into",
              "  fresh memory, take up to five times as long.",
              "* ONNX Runtime, ggml and bitsandbytes' eval repack their weights when they are loaded; that is not in the times.", ""]
    if os.path.exists(os.path.join(folder, "cpu.svg")) or picture(cells):
        lines += ["![speed against tokens](cpu.svg)", ""]
    if cells.products:
        summary(cells, lines)
    other_tables(data, lines)
    if cells.products:
        full_tables(cells, data, lines)
    with open(os.path.join(folder, "cpu.md"), "w") as file:
        file.write("\n".join(lines).rstrip("\n") + "\n")
    drawn = picture(cells)
    if drawn:
        with open(os.path.join(folder, "cpu.svg"), "w") as file:
            file.write(drawn)
    print(f"wrote {folder}/cpu.md" + (" and cpu.svg" if drawn else ""))


if __name__ == "__main__":
    actions = {"start": (start, 2), "add": (add, 3), "render": (render, 1)}
    if len(sys.argv) < 2 or sys.argv[1] not in actions or len(sys.argv) - 2 != actions[sys.argv[1]][1]:
        sys.exit(__doc__)
    actions[sys.argv[1]][0](*sys.argv[2:])
