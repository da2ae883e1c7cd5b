"""What recompute=True costs and saves over the length of a sequence: time of a training step beside the ordinary one
and torch.nn's, bytes kept for backward, and peak memory.

    python benchmarks/recompute.py                                       LSTM and GRU, T 1,000 to 100,000: ten minutes
    python benchmarks/recompute.py --lengths 1000 3000 --json FILE --figure PNG

Times are medians of steps in one process, in an order drawn anew each round, after one untimed step each. Bytes kept
are those of all tensors that autograd saves, beside the input, the output and the weights. Peak memory is what a step
raises the peak of resident memory by, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import fastrnn
from fastrnn.bench_report import conditions
from fastrnn.terminal import Progress, print_table

WAYS = {"torch.nn": "#868e96", "fastrnn": "#1864ab", "recompute": "#d9480f"}
CELLS = ("LSTM", "GRU")


def module(cell: str, way: str, H: int):
    if way == "torch.nn":
        return getattr(torch.nn, cell)(H, H)
    return getattr(fastrnn, cell)(H, H, recompute=way == "recompute")


def step(rnn, x) -> None:
    rnn(x)[0].sum().backward()


def kept_bytes(rnn, x) -> int:
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        output, _ = rnn(x)
    for t in (x, output, *rnn.parameters()):
        kept.pop(t.data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def peak() -> int:
    """kB; a child's ru_maxrss begins with its parent's, VmHWM does not."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def peak_of_one_step(cell: str, way: str, T: int, B: int, H: int) -> None:
    """In a process of its own: prints MiB."""
    step(module(cell, way, 8), torch.randn(20, 2, 8))  # what only a first call needs
    rnn, x = module(cell, way, H), torch.randn(T, B, H, requires_grad=True)
    before = peak()
    step(rnn, x)
    print((peak() - before) / 1024)


def measure(cell: str, T: int, B: int, H: int, rounds: int, tick) -> dict:
    x = torch.randn(T, B, H, requires_grad=True)
    rnns, times = {way: module(cell, way, H) for way in WAYS}, {way: [] for way in WAYS}
    order = random.Random(T)
    for round in range(rounds + 1):
        for way in order.sample(list(WAYS), len(WAYS)):
            begin = time.perf_counter()
            step(rnns[way], x)
            if round:
                times[way].append(time.perf_counter() - begin)
            x.grad = None
            tick()
    found = {"cell": cell, "T": T, "B": B, "H": H}
    found["seconds"] = {way: statistics.median(t) for way, t in times.items()}
    # torch.nn's own memory is not what autograd saves: oneDNN's workspace is no tensor that hooks see as such
    found["kept_bytes"] = {way: kept_bytes(rnns[way], x) for way in ("fastrnn", "recompute")}
    found["peak_mib"] = {}
    fastrnn.release_workspace()
    for way in WAYS:
        command = [sys.executable, __file__, "--peak", cell, way, str(T), str(B), str(H)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found["peak_mib"][way] = float(done.stdout)
        tick()
    return found


def draw(found: list[dict], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for cell, style in zip(CELLS, ("-", "--")):
        rows = [f for f in found if f["cell"] == cell]
        T = [f["T"] for f in rows]
        for way, colour in WAYS.items():
            look = dict(color=colour, linestyle=style, marker="o", markersize=4, label=f"{cell}, {way}")
            if way != "fastrnn":
                axes[0].plot(T, [f["seconds"][way] / f["seconds"]["fastrnn"] for f in rows], **look)
            if way != "torch.nn":
                axes[1].plot(T, [f["kept_bytes"][way] / 2**20 for f in rows], **look)
            axes[2].plot(T, [f["peak_mib"][way] for f in rows], **look)
    axes[0].axhline(1.0, color="#1864ab", linewidth=1)
    axes[0].axhline(1.4, color="#adb5bd", linewidth=1, linestyle=":")
    axes[0].set(title="Time of a training step over fastrnn's ordinary one", yscale="log", ylim=(0.8, 25))
    axes[0].set_yticks([1, 1.4, 2, 5, 10, 20], ["1", "1.4", "2", "5", "10", "20"])
    axes[0].minorticks_off()
    axes[1].set(title="Kept for backward, MiB", yscale="log")
    axes[2].set(title="Peak memory of a training step, MiB", yscale="log")
    for ax in axes:
        ax.set(xscale="log", xlabel="steps T")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=100)


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        cell, way, *sizes = sys.argv[2:]
        return peak_of_one_step(cell, way, *map(int, sizes))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write everything measured to this file")
    parser.add_argument("--figure", help="draw it into this PNG")
    args = parser.parse_args()
    for name in ("lengths", "batch", "hidden", "rounds", "threads"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    torch.set_num_threads(args.threads)
    facts = conditions("float32", 0.0)
    each = len(WAYS) * (args.rounds + 2)
    where = f"{facts['cpu']}, {facts['isa']}, {args.threads} threads, torch {torch.__version__}"
    title = f"B {args.batch}, I = H = {args.hidden}, one layer, float32; {where}"
    found, done = [], dict.fromkeys(CELLS, 0)
    with Progress({cell: each * len(args.lengths) for cell in CELLS}) as progress:
        for T in args.lengths:
            for cell in CELLS:

                def tick(cell=cell, T=T):
                    done[cell] += 1
                    progress.update(cell, done[cell], f"T {T:,}")

                rounds = args.rounds if T < 30_000 else max(2, args.rounds // 2)
                found.append(measure(cell, T, args.batch, args.hidden, rounds, tick))
                done[cell] += len(WAYS) * (args.rounds - rounds)
                # After each: what is interrupted keeps what it has.
                if args.json:
                    Path(args.json).write_text(json.dumps({"conditions": facts, "measured": found}, indent=1) + "\n")
                if args.figure:
                    draw(found, title, args.figure)
    show(found, title)


def show(found: list[dict], title: str) -> None:
    header = [
        "cell",
        "T",
        *(f"{way} s" for way in WAYS),
        "recompute / fastrnn",
        "kept MiB",
        "recompute's",
        "times less",
    ]
    header += [f"peak MiB {way}" for way in WAYS]
    rows = []
    for f in found:
        s, kept = f["seconds"], f["kept_bytes"]
        rows.append([
            f["cell"], f"{f['T']:,}", *(f"{s[way]:.3f}" for way in WAYS), f"{s['recompute'] / s['fastrnn']:.2f}",
            f"{kept['fastrnn'] / 2**20:.1f}", f"{kept['recompute'] / 2**20:.1f}",
            f"{kept['fastrnn'] / kept['recompute']:.1f}", *(f"{f['peak_mib'][way]:.0f}" for way in WAYS),
        ])  # fmt: skip
    print_table(title, header, rows)


if __name__ == "__main__":
    main()
