"""Sequences of very different lengths, one label each: lengths= beside torch.nn with PackedSequence.

    python examples/ragged.py               trains twice from one seed, compares, draws a picture
    python examples/ragged.py --cell lstm   the same with LSTM

The data are the functions in eight packages of Python's own standard library, token by token, some of three tokens and
some of hundreds: which package is a function from? The model reads the tokens and classifies by the state after the
last one. Both ways see the same initial weights and the same padded batches, in random order:

    torch.nn    _, h_n = gru(pack_padded_sequence(x, lengths, enforce_sorted=False))
    fastrnn     _, h_n = gru(x, lengths=lengths)
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import fastrnn
from fastrnn.drawing import OURS, THEIRS, new_figure, save, smooth, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

PACKAGES = ["asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml"]
CELLS = {"gru": "GRU", "lstm": "LSTM"}
FULL = dict(epochs=3, hidden=64, batch=32, length=256)
QUICK = dict(epochs=1, hidden=32, batch=64, length=24)
EMBEDDING, LEARNING_RATE, CLIP = 64, 6e-3, 1.0
HELD_OUT = 0.2
SEEN_TWICE = 2  # a token that training has fewer times is "unknown": it cannot be learned from
SAME, SAME_LIMIT = 10, 1e-4  # in the first ten steps rounding cannot have grown: a larger difference is a fault


# ---------------------------------------------------------------------------------------------------- data


def functions(package: Path) -> list[str]:
    """The source of every function and method in a package, without those inside of others."""
    found = []
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the escapes in someone else's strings
            nodes: list[ast.AST] = [ast.parse(source)]
        lines = source.splitlines()
        while nodes:
            for node in ast.iter_child_nodes(nodes.pop()):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.append("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                else:
                    nodes.append(node)
    return found


class Data:
    """Functions as token numbers with the number of their package, split at random into training and held-out."""

    def __init__(self, length: int, seed: int):
        root = Path(sysconfig.get_path("stdlib"))
        rows = [
            (re.findall(r"\w+|[^\w\s]", source)[:length], label)
            for label, package in enumerate(PACKAGES)
            for source in functions(root / package)
        ]
        if len({label for _, label in rows}) < len(PACKAGES):
            sys.exit(f"error: {root} does not hold the sources of {', '.join(PACKAGES)}")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        split = int(len(rows) * HELD_OUT)
        counts = Counter(token for i in order[split:] for token in rows[i][0])
        known = sorted(token for token, count in counts.items() if count >= SEEN_TWICE)
        number = {token: i + 1 for i, token in enumerate(known)}
        self.tokens = [torch.tensor([number.get(token, 0) for token in row]) for row, _ in rows]
        self.labels = torch.tensor([label for _, label in rows])
        self.held_out, self.train, self.vocabulary = order[:split], order[split:], len(known) + 1

    def batch(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens (T, B) padded to the longest, lengths (B,), labels (B,))"""
        tokens = [self.tokens[i] for i in rows]
        return pad_sequence(tokens), torch.tensor([len(t) for t in tokens]), self.labels[rows]

    def batches(self, epochs: int, size: int, seed: int):
        """One list of rows for each training step; every epoch in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for begin in range(0, len(order), size):
                yield [self.train[i] for i in order[begin : begin + size]]

    def majority(self) -> float:
        """The share of the held-out functions that a guess of training's most common package gets right."""
        most = self.labels[self.train].bincount().argmax()
        return (self.labels[self.held_out] == most).double().mean().item()


# ---------------------------------------------------------------------------------------------------- model


class Classifier(nn.Module):
    """Embedding -> RNN -> the state after each row's last token -> logits of the packages, (B, packages)."""

    def __init__(self, rnn_class: type[nn.RNNBase], vocabulary: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.rnn = rnn_class(EMBEDDING, hidden)
        self.linear = nn.Linear(hidden, len(PACKAGES))
        self.ours = rnn_class.__module__.startswith("fastrnn")

    def forward(self, tokens, lengths):
        x = self.embedding(tokens)
        if self.ours:
            _, state = self.rnn(x, lengths=lengths)
        else:
            _, state = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        h_n = state[0] if isinstance(state, tuple) else state
        return self.linear(h_n[-1])


class Trainee:
    """A model with its optimiser, its losses and the seconds each step took."""

    def __init__(self, rnn_class: type[nn.RNNBase], data: Data, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.model = Classifier(rnn_class, data.vocabulary, args.hidden)
        cell = rnn_class.__name__
        self.name = f"fastrnn.{cell}, lengths=" if self.model.ours else f"torch.nn.{cell}, packed"
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, tokens, lengths, labels) -> None:
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(self.model(tokens, lengths), labels)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)

    @torch.no_grad()
    def accuracy(self, data: Data) -> float:
        right = 0
        for begin in range(0, len(data.held_out), 256):
            tokens, lengths, labels = data.batch(data.held_out[begin : begin + 256])
            right += (self.model(tokens, lengths).argmax(-1) == labels).sum().item()
        return right / len(data.held_out)


def train(trainees: list[Trainee], data: Data, args: argparse.Namespace) -> None:
    """The trainees take turns batch by batch, so that a machine which slows down meanwhile does so for both."""
    steps = args.epochs * -(-len(data.train) // args.batch)
    with Progress({trainee.name: steps for trainee in trainees}) as progress:
        for step, rows in enumerate(data.batches(args.epochs, args.batch, args.seed)):
            batch = data.batch(rows)
            for trainee in trainees if step % 2 else trainees[::-1]:
                trainee.step(*batch)
                text = f"loss {trainee.losses[-1]:.3f}  {1e3 * trainee.seconds[-1]:6.1f} ms"
                progress.update(trainee.name, step + 1, text)


# ---------------------------------------------------------------------------------------------------- report


def setting(args: argparse.Namespace) -> str:
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    isa = fastrnn.build_info()["isa"]
    return f"{CELLS[args.cell]} of {args.hidden}, batch {args.batch}, seed {args.seed}, {threads}, {isa}"


def report(theirs: Trainee, ours: Trainee, accuracies: list[float], data: Data, args: argparse.Namespace) -> bool:
    """Prints the figures; False if the losses differ where rounding cannot explain it."""
    steps = len(ours.losses)
    epoch = steps // args.epochs
    rows = []
    for trainee, accuracy in zip((theirs, ours), accuracies):
        losses = [f"{loss:.4f}" for loss in (trainee.losses[0], sum(trainee.losses[-epoch:]) / epoch)]
        rows.append([trainee.name, *losses, f"{accuracy:.1%}", f"{sum(trainee.seconds) / args.epochs:.2f}"])
    header = ["trained on", "first loss", "last epoch's", "held-out accuracy", "s/epoch"]
    print_table(f"{setting(args)}, {args.epochs} x {epoch} steps", header, rows)
    gap = [abs(a - b) for a, b in zip(theirs.losses, ours.losses)]
    same = next((i for i, g in enumerate(gap) if not g <= SAME_LIMIT), steps)
    print(f"Baseline:   {data.majority():.1%} by always naming the package that is most common in training")
    print(f"Speed-up:   {sum(theirs.seconds) / sum(ours.seconds):.1f} (all steps of training)")
    print(f"Losses:     at most {max(gap[:SAME]):.1e} apart in the first {len(gap[:SAME])} steps, ", end="")
    print(f"at most {SAME_LIMIT:g} in the first {same} of {steps}" + ("" if same == steps else ", then rounding grows"))
    good = same >= min(SAME, steps)
    if not good:
        print(f"FAULT: a loss is not finite, or two differ by more than {SAME_LIMIT:g} in the first {SAME} steps.")
    return good


def draw(theirs: Trainee, ours: Trainee, accuracies: list[float], data: Data, args: argparse.Namespace, path: Path):
    """Both losses over their own training time, and how long the functions are."""
    figure = new_figure(10, 4.6)
    curve, histogram = figure.subplots(1, 2, width_ratios=[1.6, 1])
    reach = len(ours.losses) // 30
    for trainee, accuracy, colour in zip((theirs, ours), accuracies, (THEIRS, OURS)):
        seconds = list(accumulate(trainee.seconds))
        bold = smooth(trainee.losses, reach)
        label = f"{trainee.name}: {seconds[-1]:.1f} s, {accuracy:.1%} right"
        curve.plot(seconds, bold, color=colour, linewidth=2.2, label=label)
        curve.plot(seconds[-1], bold[-1], "o", color=colour, markersize=6)
    curve.set_xlim(left=0)
    curve.set_ylim(bottom=0)
    curve.set_xlabel("training time, seconds")
    curve.set_ylabel("loss, nats per function")
    title(curve, f"Loss over training time (mean of {2 * reach + 1} steps)")
    curve.legend(frameon=False, loc="upper right", fontsize=10)

    lengths = [len(tokens) for tokens in data.tokens]
    mean = sum(lengths) / len(lengths)
    histogram.hist(lengths, bins=32, color="#868e96")
    histogram.axvline(mean, color="#212529", linewidth=1, linestyle=":")
    histogram.annotate(f" mean {mean:.0f}", (mean, 0.93), xycoords=("data", "axes fraction"))
    histogram.set_xlabel(f"tokens of a function (cut at {args.length})")
    histogram.set_ylabel("functions")
    title(histogram, "Lengths")
    tidy(curve, histogram)
    headline = f"Which package is a function from? {len(PACKAGES)} packages, baseline {data.majority():.1%}"
    figure.suptitle(f"{headline}\n{setting(args)}", fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(
        epochs="passes over the training data",
        hidden="hidden size",
        batch="functions per batch",
        length="tokens of a function at most",
    )
    top = program("Ragged batches: lengths= beside torch.nn with PackedSequence.", sizes, FULL, "ragged.png")
    top.add_argument("--cell", choices=CELLS, default="gru", help="which RNN (default: gru)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    data = Data(args.length, args.seed)
    print(
        f"{len(data.train):,} functions to train on, {len(data.held_out):,} held out, {len(PACKAGES)} packages, "
        f"{data.vocabulary:,} different tokens. {setting(args)}.",
        flush=True,
    )
    classes = [getattr(package, CELLS[args.cell]) for package in (nn, fastrnn)]
    for rnn_class in classes:  # first-call costs are not training
        Trainee(rnn_class, data, args).step(*data.batch(data.train[:2]))
    theirs, ours = (Trainee(rnn_class, data, args) for rnn_class in classes)
    train([theirs, ours], data, args)
    accuracies = [trainee.accuracy(data) for trainee in (theirs, ours)]
    good = report(theirs, ours, accuracies, data, args)
    draw(theirs, ours, accuracies, data, args, args.output)
    print(f"Picture:    {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
