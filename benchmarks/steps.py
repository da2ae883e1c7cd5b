"""One step of modules and cells, as control loops and streams call them: no gradient, B 1 to 8, H 48 to 256.

    python benchmarks/steps.py                 one thread, about a minute and a half
    python benchmarks/steps.py --training      a loop of 16 such calls, and back through all of them
    python benchmarks/steps.py --json FILE     also writes what was measured

torch.nn's module, fastrnn's as it is, after freeze(), and its step() onto states that are kept, in one process, in an
order drawn anew each round, after untimed calls each; medians. All are given the state, as a loop gives it. Training
knows the first two alone.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

import fastrnn
from fastrnn.bench_report import conditions, geometric_mean
from fastrnn.measure import interleave
from fastrnn.terminal import Progress, positive, print_table

CLASSES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
HIDDEN, ROWS = (48, 128, 256), (1, 2, 4, 8)
WAYS = {"plain": "as it is", "frozen": "frozen", "step": "frozen, step()"}
LOOP = 16


def measure(name: str, H: int, B: int, seconds: float, order: random.Random) -> dict:
    cell = name.endswith("Cell")
    theirs = getattr(torch.nn, name)(H, H).eval()
    plain, frozen = (getattr(fastrnn, name)(H, H).eval() for _ in range(2))
    for ours in (plain, frozen):
        ours.load_state_dict(theirs.state_dict())
    frozen.freeze()
    x, h, c, kept_h, kept_c = (torch.randn(*(() if cell else (1,)), B, H) for _ in range(5))
    state, kept = ((h, c), (kept_h, kept_c)) if name.startswith("LSTM") else (h, kept_h)
    row = x if cell else x[0]
    contenders = {
        "torch": lambda: theirs(x, state),
        "plain": lambda: plain(x, state),
        "frozen": lambda: frozen(x, state),
        "step": lambda: frozen.step(row, kept),
    }
    with torch.no_grad():
        found = interleave(contenders, seconds, order)
    return dict(module=name, H=H, B=B) | {way: found[way]["median"] for way in contenders}


def measure_training(name: str, H: int, B: int, seconds: float, order: random.Random) -> dict:
    cell = name.endswith("Cell")
    theirs, ours = (getattr(package, name)(H, H) for package in (torch.nn, fastrnn))
    ours.load_state_dict(theirs.state_dict())
    layers = () if cell else (1,)
    x, h, c = (torch.randn(*steps, *layers, B, H) for steps in ((LOOP,), (), ()))

    def train(module):
        module.zero_grad()
        state = (h, c) if name.startswith("LSTM") else h
        for row in x:
            state = module(row, state) if cell else module(row, state)[1]
        (state[0] if isinstance(state, tuple) else state).sum().backward()

    found = interleave({"torch": lambda: train(theirs), "plain": lambda: train(ours)}, seconds, order)
    return dict(module=name, H=H, B=B) | {way: found[way]["median"] for way in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each shape (default: 1)")
    parser.add_argument("--training", action="store_true", help=f"a loop of {LOOP} steps, forward and back")
    parser.add_argument("--threads", type=positive, default=1, help="default: 1")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [(name, H, B) for name in CLASSES for H in HIDDEN for B in ROWS]
    order, found, measured = random.Random(0), [], measure_training if args.training else measure
    ways = {"plain": WAYS["plain"]} if args.training else WAYS
    with Progress({"shapes": len(shapes)}) as progress:
        for i, shape in enumerate(shapes):
            found.append(measured(*shape, args.seconds, order))
            progress.update("shapes", i + 1, f"{found[-1]['torch'] / found[-1]['plain']:.2f}")

    def texts(f: dict) -> list[str]:
        return [f"{1e6 * f['torch']:.1f}", *(f"{1e6 * f[w]:.1f} ({f['torch'] / f[w]:.2f})" for w in ways)]

    facts = conditions("float32", args.seconds)
    machine = f"{facts['cpu']}, {facts['isa']}, {args.threads} thread" + "s" * (args.threads > 1)
    what = f"{LOOP} steps, forward and back" if args.training else "One step"
    print_table(
        f"{what}, us (times faster than torch.nn); {machine}",
        ["I = H", "torch.nn", *ways.values()],
        [[f"{f['module']}, H {f['H']}, B {f['B']}", *texts(f)] for f in found],
    )
    means = {
        name: {w: geometric_mean(f["torch"] / f[w] for f in found if f["module"] == name) for w in ways}
        for name in CLASSES
    }
    least = {w: min(f["torch"] / f[w] for f in found) for w in ways}
    rows = [[name, *(f"{m[w]:.2f}" for w in ways)] for name, m in means.items()]
    rows.append(["least of all", *(f"{least[w]:.2f}" for w in ways)])
    print_table("Times faster than torch.nn, geometric means", ["", *ways.values()], rows)
    if args.json:
        args.json.write_text(json.dumps({"conditions": facts, "measured": found, "means": means}, indent=1) + "\n")


if __name__ == "__main__":
    main()
