"""What an open `fastrnn.probe` costs: a whole training step (forward, loss, backward, Adam) with it and without.

    python benchmarks/probe.py                 about a minute
    python benchmarks/probe.py --json FILE     also writes what was measured

Both train copies of one model, in one process, in an order drawn anew each round, after an untimed step each; medians.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from torch import nn

import fastrnn
from fastrnn.bench_report import conditions
from fastrnn.measure import interleave
from fastrnn.terminal import Progress, positive, print_table

# cell, layers, directions, I, H, T, B
SHAPES = [
    ("LSTM", 1, 1, 16, 16, 32, 8),
    ("LSTM", 1, 1, 4, 64, 128, 1),
    ("LSTM", 1, 1, 64, 64, 128, 16),
    ("LSTM", 2, 1, 64, 256, 64, 32),
    ("LSTM", 1, 2, 128, 128, 100, 16),
    ("LSTM", 1, 1, 512, 512, 35, 20),
    ("GRU", 1, 1, 16, 16, 32, 8),
    ("GRU", 4, 1, 40, 40, 100, 16),
    ("GRU", 1, 1, 128, 256, 200, 16),
    ("RNN", 1, 1, 16, 16, 200, 8),
    ("RNN", 1, 1, 8, 64, 200, 16),
    ("RNN", 2, 1, 128, 256, 64, 32),
]


class Model(nn.Module):
    def __init__(self, cell, layers, directions, I, H):
        super().__init__()
        self.rnn = getattr(fastrnn, cell)(I, H, layers, bidirectional=directions == 2)
        self.linear = nn.Linear(directions * H, 8)

    def forward(self, x):
        return self.linear(self.rnn(x)[0])


def training_step(model, x, target):
    optimiser = torch.optim.Adam(model.parameters(), 1e-5, fused=True)

    def step():
        loss = nn.functional.mse_loss(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def measure(cell, layers, directions, I, H, T, B, seconds: float, order: random.Random) -> dict:
    x, target = torch.randn(T, B, I), torch.randn(T, B, 8)
    plain, watched = (Model(cell, layers, directions, I, H) for _ in range(2))
    with fastrnn.probe(watched):
        contenders = {"plain": training_step(plain, x, target), "probe": training_step(watched, x, target)}
        found = interleave(contenders, seconds, order)
    row = dict(cell=cell, layers=layers, directions=directions, I=I, H=H, T=T, B=B)
    return row | {way: found[way]["median"] for way in contenders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape (default: 3)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    order, found = random.Random(0), []
    with Progress({"shapes": len(SHAPES)}) as progress:
        for i, shape in enumerate(SHAPES):
            found.append(measure(*shape, args.seconds, order))
            progress.update("shapes", i + 1, f"{found[-1]['probe'] / found[-1]['plain']:.3f}")
    rows = []
    for f in found:
        name = f"{f['cell']} {f['layers']} x {f['directions']}, I {f['I']}, H {f['H']}, T {f['T']}, B {f['B']}"
        rows.append([name, f"{1e3 * f['plain']:.3f}", f"{1e3 * f['probe']:.3f}", f"{f['probe'] / f['plain'] - 1:+.1%}"])
    facts = conditions("float32", args.seconds)
    title = f"A training step with a probe; {facts['cpu']}, {facts['isa']}, {args.threads} threads"
    print_table(title, ["layers x directions", "plain ms", "probe ms", "more"], rows)
    if args.json:
        args.json.write_text(json.dumps({"conditions": facts, "measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
