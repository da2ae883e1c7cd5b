"""RNN, LSTM, GRU, 1D CNN and Transformer encoder on one task, with as many parameters each, side by side.

    python examples/comparison.py            trains all of them, prints a table, draws a picture
    python examples/comparison.py --quick

The task: scikit-learn's handwritten digits (8 x 8 pixels) as sequences of 32 steps, two pixels a step, row by row, as
Le, Jaitly, Hinton (2015, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units") read MNIST pixel by
pixel: what lies below a pixel comes four steps later, and nobody tells the model so.

Each width is solved for the same number of parameters. Each model has what its kind usually has: the recurrent ones
orthogonal recurrent weights and, LSTM, a forget gate that begins open (Jozefowicz, Zaremba, Sutskever, 2015, "An
Empirical Exploration of Recurrent Network Architectures"), and the last state is read; the CNN residual blocks of
dilated convolutions with batch norm (Bai, Kolter, Koltun, 2018, "An Empirical Evaluation of Generic Convolutional and
Recurrent Networks for Sequence Modeling") and a mean over time; the Transformer (Vaswani et al., 2017, "Attention Is
All You Need") learned positions, norms first, a mean over time. Optimiser, schedule, epochs and batches are the same;
of three learning rates each model has the one that is best on a validation part. The test part is looked at once.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from bisect import bisect_left
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import cross_entropy

import fastrnn
from fastrnn.drawing import COLOURS, GREY, new_figure, save, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

FULL = dict(epochs=25, seeds=3, parameters=10_500, batch=64)
QUICK = dict(epochs=2, seeds=2, parameters=7_000, batch=128)
STEPS, PIXELS, CLASSES = 32, 2, 10
RATES = [6e-3, 2e-2, 6e-2]  # tried beyond both ends too: none is better there by more than a few images
WEIGHT_DECAY, CLIP, WARM_UP = 0.1, 1.0, 0.2
ROUNDS = 15  # of timing inference
OFF_BUDGET = 0.03  # more would not be a fair comparison


# ---------------------------------------------------------------------------------------------------- data


class Digits:
    """Images as (rows, 32, 2) sequences, standardised by the training part, and which rows are for what: 60% to train
    on, 20% to choose the learning rate by, 20% to test on."""

    def __init__(self, seed: int):
        found = load_digits()
        pixels, self.labels = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        fifth = len(order) // 5
        self.test, self.validation, self.train = order[:fifth], order[fifth : 2 * fifth], order[2 * fifth :]
        spread, mean = torch.std_mean(pixels[self.train])
        self.images = ((pixels - mean) / spread).reshape(-1, STEPS, PIXELS)

    def part(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[rows], self.labels[rows]

    def majority(self) -> float:
        """The share of the test part that training's most common digit gets right."""
        return (self.labels[self.test] == self.labels[self.train].bincount().argmax()).double().mean().item()

    def logistic_regression(self) -> float:
        """Test accuracy of a linear classifier that sees the whole image at once."""
        (x, y), (x_test, y_test) = self.part(self.train), self.part(self.test)
        return LogisticRegression(max_iter=1000).fit(x.flatten(1), y).score(x_test.flatten(1), y_test)


# ---------------------------------------------------------------------------------------------------- models


class Recurrent(nn.Module):
    """The state after the last step -> logits. Images are (B, T, pixels)."""

    def __init__(self, rnn_class: type[nn.RNNBase], width: int):
        super().__init__()
        self.rnn, self.head = rnn_class(PIXELS, width, batch_first=True), nn.Linear(width, CLASSES)
        fastrnn.init.orthogonal(self.rnn)
        nn.init.zeros_(self.rnn.bias_ih_l0)
        nn.init.zeros_(self.rnn.bias_hh_l0)
        if isinstance(self.rnn, nn.LSTM):
            fastrnn.init.forget_bias(self.rnn, 1.0)

    def forward(self, x):
        _, state = self.rnn(x)
        h_n = state[0] if isinstance(state, tuple) else state
        return self.head(h_n[-1])  # a view of the outputs would keep all of them for backward


class Residual(nn.Module):
    def __init__(self, width: int, dilation: int):
        super().__init__()
        convolution = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.net = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), convolution)

    def forward(self, x):
        return x + self.net(x)


class Convolutional(nn.Module):
    """With dilations of 1 to 8 the last layer sees 17 steps either side: from the middle, the whole sequence."""

    def __init__(self, width: int):
        super().__init__()
        blocks = [Residual(width, 2**i) for i in range(4)]
        self.net = nn.Sequential(nn.Conv1d(PIXELS, width, 5, padding=2), *blocks, nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.net(x.transpose(1, 2)).mean(-1))


class Transformer(nn.Module):
    """Two layers of 24, two heads; `width` is that of the feed-forward part."""

    def __init__(self, width: int, size: int = 24):
        super().__init__()
        self.embedding, self.positions = nn.Linear(PIXELS, size), nn.Parameter(0.02 * torch.randn(STEPS, size))
        layer = nn.TransformerEncoderLayer(size, 2, width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(size), enable_nested_tensor=False)
        self.head = nn.Linear(size, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x) + self.positions).mean(1))


KINDS = {
    "RNN": lambda width: Recurrent(fastrnn.RNN, width),
    "LSTM": lambda width: Recurrent(fastrnn.LSTM, width),
    "GRU": lambda width: Recurrent(fastrnn.GRU, width),
    "CNN": Convolutional,
    "Transformer": Transformer,
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def solve(kind: str, budget: int) -> int:
    """The width whose number of parameters comes nearest to the budget; it grows with the width."""

    def size(width: int) -> int:
        return parameters(KINDS[kind](width))

    high = 2
    while size(high) < budget:
        high *= 2
    width = bisect_left(range(high), budget, lo=high // 2, key=size)
    return min(width - 1 or 1, width, key=lambda w: abs(size(w) - budget))


# ---------------------------------------------------------------------------------------------------- training


class Trainee:
    """A model of one kind, learning rate and seed, with its optimiser and the seconds and loss of each step."""

    def __init__(self, kind: str, width: int, rate: float, seed: int, steps: int):
        torch.manual_seed(seed)
        self.kind, self.rate, self.seed, self.model = kind, rate, seed, KINDS[kind](width)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), rate, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, rate, total_steps=steps + 1, pct_start=WARM_UP
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        begin = time.perf_counter()
        loss = cross_entropy(self.model(x), y)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)

    @torch.no_grad()
    def judge(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        """(accuracy, -loss): the larger, the better, the loss where accuracies are the same."""
        logits = self.model.eval()(x)
        return (logits.argmax(-1) == y).double().mean().item(), -cross_entropy(logits, y).item()


def batches(data: Digits, epochs: int, size: int, seed: int):
    """The rows of each training step; every epoch in an order of its own, every row once."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from data.train[torch.randperm(len(data.train), generator=generator)].split(size)


def train(trainees: list[Trainee], data: Digits, args: argparse.Namespace, progress: Progress, done: dict) -> None:
    """All take turns step by step, in an order drawn anew: what slows the machine down meanwhile slows all of them."""
    order = random.Random(args.seed)
    streams = {seed: batches(data, args.epochs, args.batch, args.seed + seed) for seed in {t.seed for t in trainees}}
    for rows in zip(*streams.values()):
        given = {seed: data.part(r) for seed, r in zip(streams, rows)}
        for trainee in order.sample(trainees, len(trainees)):
            trainee.step(*given[trainee.seed])
            done[trainee.kind] += 1
            progress.update(trainee.kind, done[trainee.kind], f"loss {trainee.losses[-1]:.3f}")


def train_all(data: Digits, widths: dict[str, int], args: argparse.Namespace) -> dict[str, list[Trainee]]:
    """For each kind its trainees at the rate that validation chose, one of each seed."""
    steps = args.epochs * math.ceil(len(data.train) / args.batch)
    done = dict.fromkeys(KINDS, 0)
    with Progress(dict.fromkeys(KINDS, steps * (len(RATES) + args.seeds - 1))) as progress:
        first = {kind: [Trainee(kind, widths[kind], rate, 0, steps) for rate in RATES] for kind in KINDS}
        train(sum(first.values(), []), data, args, progress, done)
        best = {kind: max(tried, key=lambda t: t.judge(*data.part(data.validation))) for kind, tried in first.items()}
        others = [
            Trainee(kind, widths[kind], best[kind].rate, seed, steps) for kind in KINDS for seed in range(1, args.seeds)
        ]
        train(others, data, args, progress, done)
    return {kind: [best[kind], *(t for t in others if t.kind == kind)] for kind in KINDS}


# ---------------------------------------------------------------------------------------------------- measuring


def kept_for_backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes that autograd keeps from forward to backward: most of what a training step's peak grows by with batch and
    length. Every storage once, without parameters, buffers and the input; what fastrnn's kernels keep is among them."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x, y)}
    saved = {}  # keeps them alive: or an address might come twice

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = cross_entropy(model.train()(x), y)
    total = sum(storage.nbytes() for address, storage in saved.items() if address not in known)
    loss.backward()
    return total


@torch.no_grad()
def inference_seconds(models: dict[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    """Medians of calls in turn, in an order drawn anew."""
    order, seconds = random.Random(0), {kind: [] for kind in models}
    for _ in range(ROUNDS):
        for kind in order.sample(list(models), len(models)):
            begin = time.perf_counter()
            models[kind].eval()(x)
            seconds[kind].append(time.perf_counter() - begin)
    return {kind: statistics.median(s) for kind, s in seconds.items()}


def measure(data: Digits, trained: dict[str, list[Trainee]], args: argparse.Namespace) -> dict[str, dict]:
    test, batch = data.part(data.test), data.part(data.train[: args.batch])
    inference = inference_seconds({kind: trainees[0].model for kind, trainees in trained.items()}, test[0])
    found = {}
    for kind, trainees in trained.items():
        found[kind] = {
            "parameters": parameters(trainees[0].model),
            "rate": trainees[0].rate,
            "accuracies": [trainee.judge(*test)[0] for trainee in trainees],
            "finite": all(map(math.isfinite, sum((trainee.losses for trainee in trainees), []))),
            "epoch": statistics.mean(sum(trainee.seconds) / args.epochs for trainee in trainees),
            "inference": inference[kind],
            "kept": kept_for_backward(trainees[0].model, *batch),
        }
    return found


# ---------------------------------------------------------------------------------------------------- report


def setting(args: argparse.Namespace) -> str:
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"{args.epochs} epochs, batch {args.batch}, {args.seeds} seeds, {threads}, {fastrnn.build_info()['isa']}"


def report(found: dict[str, dict], widths: dict[str, int], baselines: dict[str, float], args) -> bool:
    """Prints the figures; False if the comparison is not fair, or a model has learned nothing."""
    rows = [[name, *[""] * 3, f"{accuracy:.1%}", *[""] * 4] for name, accuracy in baselines.items()]
    faults = []
    for kind, f in found.items():
        accuracies = f["accuracies"]
        mean = statistics.mean(accuracies)
        rows.append([
            kind, str(widths[kind]), f"{f['parameters']:,}", f"{f['rate']:g}", f"{mean:.1%}",
            f"{min(accuracies):.1%} to {max(accuracies):.1%}", f"{1e3 * f['epoch']:.0f}", f"{1e3 * f['inference']:.1f}",
            f"{f['kept'] / 2**20:.2f}",
        ])  # fmt: skip
        if not abs(f["parameters"] / args.parameters - 1) <= OFF_BUDGET:
            faults.append(
                f"{kind} has {f['parameters']} parameters, expected {args.parameters} within {OFF_BUDGET:.0%}"
            )
        if not f["finite"] or not mean > baselines["the most common digit"]:
            faults.append(f"{kind} has learned nothing: accuracy {mean:.1%}, or a loss that is not finite")
    header = ["model", "width", "parameters", "rate", "accuracy", "of the seeds", "ms/epoch", "ms to infer", "MiB kept"]
    print_table(setting(args), header, rows)
    print("accuracy: of the test images, mean over seeds. ms to infer: all test images in one batch.")
    print("MiB kept: for backward, in one training step; two pixels a step, but for the baselines.")
    for fault in faults:
        print(f"FAULT: {fault}.")
    return not faults


def bars(axes, values: list[float], text: str, what: str) -> None:
    """A bar for each kind, its value beside it."""
    axes.barh(list(KINDS), values, color=COLOURS[: len(KINDS)])
    axes.bar_label(axes.containers[0], [f" {value:{text}}" for value in values], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(values))
    title(axes, what)
    tidy(axes, grid="x")


def draw(found: dict[str, dict], trained: dict[str, list[Trainee]], baselines: dict[str, float], args, path: Path):
    """Loss over training time, accuracies, and what a model costs."""
    figure = new_figure(11, 6.6)
    axes = figure.subplot_mosaic([["loss", "loss", "accuracy"], ["epoch", "inference", "kept"]])
    for (kind, trainees), colour in zip(trained.items(), COLOURS):
        size = len(trainees[0].losses) // args.epochs
        curve = [
            statistics.mean(sum((t.losses[i : i + size] for t in trainees), []))
            for i in range(0, size * args.epochs, size)
        ]
        seconds = [found[kind]["epoch"] * (i + 1) for i in range(args.epochs)]
        axes["loss"].semilogy(seconds, curve, color=colour, linewidth=2, marker="o", markersize=3, label=kind)
        dots = found[kind]["accuracies"]
        axes["accuracy"].plot([100 * a for a in dots], [kind] * len(dots), "o", color=colour, alpha=0.8)
    axes["loss"].set_xlim(left=0)
    axes["loss"].set_xlabel("training time, seconds")
    axes["loss"].set_ylabel("training loss, nats")
    axes["loss"].legend(frameon=False, ncols=2)
    title(axes["loss"], "Loss, epoch by epoch (mean over seeds)")
    linear = 100 * baselines["logistic regression"]
    axes["accuracy"].axvline(linear, color=GREY, linestyle=":")
    axes["accuracy"].annotate("logistic regression ", (linear, -0.45), ha="right", va="center", color=GREY, fontsize=9)
    axes["accuracy"].set_ylim(len(KINDS) - 0.5, -0.8)
    axes["accuracy"].set_xlabel("% of test images, each seed")
    title(axes["accuracy"], "Accuracy")
    tidy(axes["loss"], axes["accuracy"])
    bars(axes["epoch"], [1e3 * f["epoch"] for f in found.values()], ".0f", "Training, ms per epoch")
    bars(axes["inference"], [1e3 * f["inference"] for f in found.values()], ".1f", "Inference, ms for all test images")
    bars(axes["kept"], [f["kept"] / 2**20 for f in found.values()], ".2f", "Kept for backward, MiB per step")
    headline = f"Digits, two pixels a step: five kinds of {args.parameters:,} parameters"
    figure.suptitle(f"{headline}\n{setting(args)}", fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(
        epochs="passes over the training images",
        seeds="trainings of each model at the chosen learning rate",
        parameters="of each model",
        batch="images per batch",
    )
    return program("RNN, LSTM, GRU, CNN and Transformer side by side.", sizes, FULL, "comparison.png")


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    data = Digits(args.seed)
    widths = {kind: solve(kind, args.parameters) for kind in KINDS}
    parts = ", ".join(f"{len(getattr(data, name)):,} to {name}" for name in ("train", "test"))
    print(f"{parts}, {len(data.validation)} to choose a rate by. {setting(args)}.", flush=True)
    for kind, width in widths.items():  # first-call costs are not training
        Trainee(kind, width, RATES[0], 0, 1).step(*data.part(data.train[: args.batch]))
    trained = train_all(data, widths, args)
    found = measure(data, trained, args)
    baselines = {"the most common digit": data.majority(), "logistic regression": data.logistic_regression()}
    good = report(found, widths, baselines, args)
    draw(found, trained, baselines, args, args.output)
    print(f"Picture: {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
