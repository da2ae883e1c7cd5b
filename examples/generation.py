"""One input, a whole sequence: an LSTM paints the digit it is asked for, pixel by pixel.

    python examples/generation.py                    trains, paints ten of each digit, draws them beside real ones
    python examples/generation.py --temperature 0.7  bets more on what is likely: clearer digits, less variety
    python examples/generation.py --cell gru         the same with GRU

The data are scikit-learn's 1,797 handwritten digits: 8 x 8 pixels of 17 grey levels. Row by row they are a sequence of
64 levels x_1 ... x_64, and the model is a distribution over all such sequences, given the label c (one step at a time,
as in A. Graves 2013, "Generating Sequences With Recurrent Neural Networks", and for pixels in A. van den Oord,
N. Kalchbrenner, K. Kavukcuoglu 2016, "Pixel Recurrent Neural Networks"):

    p(x_1 ... x_64 | c) = product over t of p(x_t | x_1 ... x_{t-1}, c)
    h_t = LSTM(level(x_{t-1}) + place(t) + label(c), h_{t-1})       p(x_t | ...) = softmax((W h_t + b) / temperature)

Training knows x_{t-1} (teacher forcing): one call for the whole sequence. Painting draws x_t at random and feeds it
back: `lstm.step()`, pixel by pixel. Bits per pixel are -log2 p, held-out digits, temperature 1. A model that draws each
pixel by itself, from the histogram of its place and class, stands beside it: how much is in the order of the pixels?
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastrnn
from fastrnn.drawing import COLOURS, GREY, new_figure, save, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

CELLS = {"gru": "GRU", "lstm": "LSTM"}
FULL = dict(epochs=40, hidden=128, batch=64)
QUICK = dict(epochs=6, hidden=32, batch=64)
CLASSES, LEVELS, SIDE = 10, 17, 8
START = LEVELS  # the level "before" the first pixel
EMBEDDING, DROPOUT, LEARNING_RATE, WEIGHT_DECAY, CLIP = 64, 0.2, 1e-2, 0.1, 1.0
VALIDATION, HELD_OUT = 240, 360
PAINTED = 100  # digits of each class
PSEUDO_COUNTS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of which the validation part chooses for each histogram


# ---------------------------------------------------------------------------------------------------- data


class Part:
    """Some of the digits: pixels (64, N), row by row from the top, and labels (N,)."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows) -> Part:
        return Part(self.pixels[:, rows], self.labels[rows])


def split(seed: int) -> tuple[Part, Part, Part]:
    """(training, validation, held out), at random"""
    pixels, labels = load_digits(return_X_y=True)
    digits = Part(torch.tensor(pixels).long().T.contiguous(), torch.tensor(labels))
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    held_out, validation, train = order.split([HELD_OUT, VALIDATION, len(digits) - HELD_OUT - VALIDATION])
    return digits[train], digits[validation], digits[held_out]


# ---------------------------------------------------------------------------------------------------- models


class Painter(nn.Module):
    def __init__(self, cell: str, hidden: int):
        super().__init__()
        self.level, self.label = nn.Embedding(LEVELS + 1, EMBEDDING), nn.Embedding(CLASSES, EMBEDDING)
        self.place = nn.Parameter(torch.randn(SIDE * SIDE, EMBEDDING))
        self.rnn = getattr(fastrnn, CELLS[cell])(EMBEDDING, hidden)
        self.dropout, self.linear = nn.Dropout(DROPOUT), nn.Linear(hidden, LEVELS)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Logits (64, B, levels) of each pixel, the ones before it given."""
        before = torch.cat([torch.full_like(pixels[:1], START), pixels[:-1]])
        x = self.level(before) + self.place[:, None] + self.label(labels)
        return self.linear(self.dropout(self.rnn(self.dropout(x))[0]))

    @torch.no_grad()
    def paint(self, labels: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """Pixels (64, B), each drawn after the ones before it. Call eval() first: no dropout here."""
        self.rnn.freeze()  # the weights stay as they are from step to step: packed once
        h = torch.zeros(1, len(labels), self.rnn.hidden_size)
        state = (h, torch.zeros_like(h)) if isinstance(self.rnn, nn.LSTM) else h
        label, level, painted = self.label(labels), torch.full_like(labels, START), []
        for place in self.place:
            output, state = self.rnn.step(self.level(level) + place + label, state)  # over the state before
            level = (self.linear(output) / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]
            painted.append(level)
        return torch.stack(painted)

    @torch.no_grad()
    def bits(self, part: Part) -> float:
        """Bits per pixel."""
        return nats(self.eval()(part.pixels, part.labels), part.pixels).item() / math.log(2)


def nats(logits: Tensor, pixels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), pixels.flatten())


class Histogram:
    """Every pixel by itself: log p (64, classes, levels), counted; the same for all classes unless `by_class`."""

    def __init__(self, train: Part, validation: Part, by_class: bool):
        hot = nn.functional.one_hot(train.pixels, LEVELS).double()  # (64, N, levels)
        counts = torch.zeros(SIDE * SIDE, CLASSES, LEVELS, dtype=torch.float64).index_add_(1, train.labels, hot)
        counts = counts if by_class else counts.sum(1, keepdim=True).expand_as(counts)
        found = [((counts + a) / (counts + a).sum(-1, keepdim=True)).log() for a in PSEUDO_COUNTS]
        self.logits = min(found, key=lambda logits: nats(logits[:, validation.labels], validation.pixels))

    def bits(self, part: Part) -> float:
        return nats(self.logits[:, part.labels], part.pixels).item() / math.log(2)

    def paint(self, labels: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        p = (self.logits[:, labels] / temperature).softmax(-1)
        return p.flatten(0, 1).multinomial(1, generator=generator).view(SIDE * SIDE, -1)


def train(model: Painter, train: Part, validation: Part, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Bits per pixel after each epoch: (training, with its dropout; validation, without)."""
    generator = torch.Generator().manual_seed(args.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = args.epochs * -(-len(train) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=batches)
    curve = []
    with Progress({"training": args.epochs}) as progress:
        for epoch in range(args.epochs):
            model.train()
            total = 0.0
            for rows in torch.randperm(len(train), generator=generator).split(args.batch):
                batch = train[rows]
                loss = nats(model(batch.pixels, batch.labels), batch.pixels)
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimiser.step()
                schedule.step()
                total += loss.item() * len(batch)
            curve.append((total / len(train) / math.log(2), model.bits(validation)))
            progress.update("training", epoch + 1, f"{curve[-1][1]:.3f} bits per pixel (validation)")
    return curve


# ---------------------------------------------------------------------------------------------------- report


def recognised(pixels: Tensor, labels: Tensor, train: Part) -> tuple[float, float]:
    """(share that has the label of the nearest training digit, mean distance to it); pixels (64, N)."""
    distance, nearest = torch.cdist(pixels.T.double(), train.pixels.T.double()).min(1)
    return (train.labels[nearest] == labels).double().mean().item(), distance.mean().item()


def report(rows: dict[str, tuple[float | None, Tensor, Tensor]], train: Part, heading: str, ours: str) -> bool:
    """rows: name -> (bits, pixels, labels). False if ours has learned next to nothing."""
    cells, bits, shares = [], {}, {}
    for name, (b, pixels, labels) in rows.items():
        shares[name], distance = recognised(pixels, labels, train)
        bits[name] = math.inf if b is None else b
        cells.append([name, "" if b is None else f"{b:.3f}", f"{shares[name]:.1%}", f"{distance:.1f}"])
    print_table(heading, ["digits from", "bits/pixel", "recognised", "distance"], cells)
    print("Recognised: the nearest digit of the training part is of the asked class (chance: 10%)")
    print("Distance:   to that digit, Euclidean over 64 pixels of 0 to 16: copies would be at 0, noise is far away")
    copies = (torch.cdist(rows[ours][1].T.double(), train.pixels.T.double()) == 0).any(1).sum().item()
    print(f"Copies:     {copies} of the {rows[ours][1].size(1)} painted digits are training digits, pixel for pixel")
    good = bits[ours] < bits["histogram of place"]
    if not good:
        print("FAULT: a histogram that does not even know the class has fewer bits per pixel.")
    return good


def mosaic(pixels: Tensor, labels: Tensor) -> Tensor:
    """The first ten of every class as one picture: a column for each class, white between them."""
    picture = torch.zeros(10 * (SIDE + 1), CLASSES * (SIDE + 1))
    for c in range(CLASSES):
        for i, digit in enumerate(pixels[:, labels == c].T[:10]):
            top, left = i * (SIDE + 1), c * (SIDE + 1)
            picture[top : top + SIDE, left : left + SIDE] = digit.view(SIDE, SIDE)
    return picture[:-1, :-1]


def draw(rows: dict[str, tuple[float | None, Tensor, Tensor]], shown: dict[str, str], curve, heading: str, path: Path):
    """What was painted, beside real digits (shown: name -> its title), and how it was learned."""
    figure = new_figure(9.6, 9.9)
    axes = figure.subplots(2, 2).flatten()
    for panel, (name, text) in zip(axes, shown.items()):
        panel.imshow(mosaic(*rows[name][1:]).numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1, interpolation="nearest")
        panel.set_axis_off()
        title(panel, text)
    losses = axes[3]
    epochs = range(1, len(curve) + 1)
    losses.plot(epochs, [t for t, _ in curve], color=COLOURS[5], label="training (with dropout)")
    losses.plot(epochs, [v for _, v in curve], color=COLOURS[0], linewidth=2.2, label="validation")
    for name, (b, _, _) in rows.items():
        if name.startswith("histogram"):
            losses.axhline(b, color=GREY, linewidth=1, linestyle="--")
            losses.annotate(f"{name}, held out", (len(curve), b), ha="right", va="bottom", fontsize=9, color="#495057")
    losses.set_xlabel("epoch")
    losses.set_ylabel("bits per pixel")
    losses.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.9))
    title(losses, "Learning")
    tidy(losses)
    figure.suptitle(heading, fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected a number from 0.01 to 100, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    sizes = dict(epochs="passes over the training digits", hidden="hidden size", batch="digits per batch")
    top = program("One to many: digits painted pixel by pixel.", sizes, FULL, "generation.png")
    top.add_argument("--cell", choices=CELLS, default="lstm", help="which RNN (default: lstm)")
    top.add_argument("--temperature", type=temperature, default=1.0, metavar="X", help="of painting (default: 1)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    parts = training, validation, held_out = split(args.seed)
    print("{:,} digits to train on, {} for validation, {} held out.".format(*map(len, parts)), flush=True)
    torch.manual_seed(args.seed)
    model = Painter(args.cell, args.hidden)
    curve = train(model, training, validation, args)

    ours, by_class = CELLS[args.cell] + ", pixel after pixel", "histogram of place and class"
    models = {"histogram of place": Histogram(training, validation, False)}
    models |= {by_class: Histogram(training, validation, True), ours: model.eval()}
    labels, generator = torch.arange(CLASSES).repeat_interleave(PAINTED), torch.Generator().manual_seed(args.seed)
    noise = torch.randint(LEVELS, (SIDE * SIDE, len(labels)), generator=generator)
    rows = {"uniform": (math.log2(LEVELS), noise, labels)}
    for name, m in models.items():
        rows[name] = m.bits(held_out), m.paint(labels, args.temperature, generator), labels
    rows["real, held out"] = None, held_out.pixels, held_out.labels

    size = f"{CELLS[args.cell]} of {args.hidden}, {args.epochs} epochs, seed {args.seed}"
    good = report(rows, training, f"{size}, temperature {args.temperature:g}", ours)
    shown = {"real, held out": "Real digits, held out", ours: f"Painted by the {CELLS[args.cell]}"}
    shown |= {by_class: "Every pixel by itself, from its class's histogram"}
    result = f"{rows[ours][0]:.2f} bits per pixel beside {rows[by_class][0]:.2f}"
    draw(rows, shown, curve, f"Digits pixel by pixel: {result}\n{size}, temperature {args.temperature:g}", args.output)
    print(f"Picture:    {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
