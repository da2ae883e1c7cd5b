"""One label for every step (many-to-many, equal lengths): a bidirectional GRU colours Python source as an editor does.

    python examples/tagging.py             trains, prints a table for each tag, draws what it has learned
    python examples/tagging.py --one-way   the same reading from left to right only

The data are files of Python's own standard library, character by character. The tag of a character (keyword, name,
number, string, comment, operator, space) comes from the `tokenize` module, the model sees nothing but characters: at
every step t it has read what is before x_t in one direction and what is behind it in the other (Schuster and Paliwal
1997, "Bidirectional recurrent neural networks"):

    y_t = W [h_t forward, h_t backward] + b        loss: the mean of -log softmax(y_t)[tag_t] over all steps and rows

Single characters tell little: an `i` may stand in a name, in `if`, in a string or in a comment. So there are two
baselines: the most common tag, and the most common tag of each character. Held-out files are never trained on.
"""

from __future__ import annotations

import argparse
import io
import keyword
import sys
import sysconfig
import tokenize
from itertools import accumulate, groupby
from pathlib import Path

import torch
from torch import nn

import fastrnn
from fastrnn.drawing import COLOURS, GREY, OURS, new_figure, save, smooth, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

TAGS = ["comment", "keyword", "name", "number", "operator", "space", "string"]
TAG = {name: i for i, name in enumerate(TAGS)}
SHOWN = dict(zip(["keyword", "number", "string", "operator", "space"], COLOURS)) | {"comment": GREY, "name": "#000000"}
FULL = dict(steps=600, files=60, hidden=96, batch=32, length=160)
QUICK = dict(steps=70, files=10, hidden=32, batch=32, length=64)
EMBEDDING, LEARNING_RATE, CLIP = 32, 4e-3, 1.0
HELD_OUT = 0.2
MIXED, WORST, COLUMNS = 17, 6, 80  # lines of the picture's two pieces of source, and the most characters of a line


# ---------------------------------------------------------------------------------------------------- data


def kind(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    names = {"COMMENT": "comment", "NUMBER": "number", "STRING": "string", "OP": "operator"}
    return names.get(tokenize.tok_name[token.type], "space")


def tags(source: str) -> list[int]:
    """The tag of every character, by Python's own tokenizer. An f-string is a string as a whole, as it was before
    Python 3.12, which takes it apart between FSTRING_START and FSTRING_END."""
    begins = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
    found = [TAG["space"]] * len(source)
    opened = []  # where the f-strings around this token begin
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        begin, end = (begins[row - 1] + column for row, column in (token.start, token.end))
        tag, name = kind(token), tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):
            opened.append(begin)
        elif name.endswith("STRING_END"):
            begin, tag = opened.pop(), "string"
        if tag != "space" and not opened:
            found[begin:end] = [TAG[tag]] * (end - begin)
    return found


def sources(count: int, seed: int) -> list[str]:
    """`count` modules of the standard library, drawn at random, without those that hold little else than tables."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.glob("*.py") if 4_000 <= p.stat().st_size <= 120_000 and p.name[0] != "_")
    if len(paths) < count:
        sys.exit(f"error: argument --files: expected at most {len(paths)}, as many as {root} holds, got {count}")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    found = (paths[i].read_text(encoding="utf-8") for i in order[:count])
    return [text for text in found if "\f" not in text]  # a form feed is the end of a line to str, not to tokenize


class Data:
    """Characters as numbers with their tags, whole files for training and whole files held out."""

    def __init__(self, files: list[str]):
        split = max(1, int(len(files) * HELD_OUT))
        self.text = "".join(files[:split])  # what is held out
        train = "".join(files[split:])
        number = {c: i + 1 for i, c in enumerate(sorted(set(train)))}  # 0: not in the training text
        self.characters = len(number) + 1
        self.train, self.held_out = (
            (torch.tensor([number.get(c, 0) for c in text]), torch.tensor([t for f in part for t in tags(f)]))
            for text, part in ((train, files[split:]), (self.text, files[:split]))
        )

    def batches(self, steps: int, batch: int, length: int, seed: int):
        """(characters, tags), each (T, B): windows of `length` at random places of the training text."""
        generator, within = torch.Generator().manual_seed(seed), torch.arange(length)[:, None]
        for _ in range(steps):
            windows = within + torch.randint(len(self.train[0]) - length, (batch,), generator=generator)
            yield self.train[0][windows], self.train[1][windows]

    def baselines(self) -> dict[str, torch.Tensor]:
        """What two rules learned from the training text say of the held-out text."""
        (characters, tags), seen = self.train, self.held_out[0]
        counts = torch.zeros(self.characters, len(TAGS)).index_put_((characters, tags), torch.ones(1), accumulate=True)
        most = tags.bincount(minlength=len(TAGS)).argmax()
        counts[0, most] = 1  # a character that training does not have
        return {
            "the most common tag": most.expand(len(seen)),
            "each character's most common tag": counts.argmax(1)[seen],
        }


# ---------------------------------------------------------------------------------------------------- model


class Tagger(nn.Module):
    """Embedding -> GRU -> linear at every step: the logits of the tags, (T, B, tags)."""

    def __init__(self, characters: int, hidden: int, bidirectional: bool):
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.rnn = fastrnn.GRU(EMBEDDING, hidden, bidirectional=bidirectional)
        self.linear = nn.Linear(hidden * (1 + bidirectional), len(TAGS))

    def forward(self, characters):
        output, _ = self.rnn(self.embedding(characters))
        return self.linear(output)


def train(model: Tagger, data: Data, args: argparse.Namespace) -> list[float]:
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    losses = []
    with Progress({"training": args.steps}) as progress:
        for characters, wanted in data.batches(args.steps, args.batch, args.length, args.seed):
            loss = nn.functional.cross_entropy(model(characters).flatten(0, 1), wanted.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            decay.step()
            losses.append(loss.item())
            progress.update("training", len(losses), f"loss {losses[-1]:.3f}")
    return losses


@torch.no_grad()
def predict(model: Tagger, characters: torch.Tensor, length: int) -> torch.Tensor:
    """The tags of a text, window by window.

    A window's first and last characters lack what is before and behind them, so windows overlap: of each only the
    middle half counts, except at the two ends of the text.
    """
    quarter = max(1, length // 4)
    found = torch.empty_like(characters)
    begins = list(range(0, max(len(characters) - length, 0), 2 * quarter)) + [max(len(characters) - length, 0)]
    for i in range(0, len(begins), 64):
        windows = torch.tensor(begins[i : i + 64]) + torch.arange(min(length, len(characters)))[:, None]
        got = model(characters[windows]).argmax(-1)
        for b, begin in enumerate(begins[i : i + 64]):
            skip = quarter if begin else 0
            found[begin + skip : begin + len(windows)] = got[skip:, b]  # the next window writes over the end of this
    return found


# ---------------------------------------------------------------------------------------------------- report


def accuracy(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return (found == wanted).double().mean().item()


def f1(found: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """For each tag 2 hits / (said + true): the harmonic mean of precision and recall; 0 for a tag without hits."""
    said, true, hits = (x.bincount(minlength=len(TAGS)).double() for x in (found, wanted, wanted[found == wanted]))
    return (2 * hits / (said + true).clamp(min=1)).tolist()


def setting(args: argparse.Namespace) -> str:
    way = "one way" if args.one_way else "both ways"
    return (
        f"GRU of {args.hidden} {way}, {args.steps} steps of {args.batch} x {args.length} characters, seed {args.seed}"
    )


def report(results: dict[str, torch.Tensor], wanted: torch.Tensor, args: argparse.Namespace) -> bool:
    """Prints a column for each way of tagging; False if the model, the last of them, is not above the baselines."""
    scores = [accuracy(found, wanted) for found in results.values()]
    rows = [["all: accuracy", "100%", *(f"{score:.1%}" for score in scores)]]
    each = [f1(found, wanted) for found in results.values()]
    share = wanted.bincount(minlength=len(TAGS)) / len(wanted)
    rows += [[f"{name}: F1", f"{share[i]:.1%}", *(f"{f[i]:.3f}" for f in each)] for i, name in enumerate(TAGS)]
    print_table(f"{setting(args)}: {len(wanted):,} held-out characters", ["tag", "share", *results], rows)
    good = scores[-1] > max(scores[:-1])
    if not good:
        print("FAULT: the model is not better than the most common tag of each character.")
    return good


def pieces(text: str, found: torch.Tensor, wanted: torch.Tensor) -> list[tuple[int, int, str]]:
    """(begin, end, title) of two pieces of source to show: lines with much of what cannot be told without context,
    whatever the predictions, and the lines with the most errors."""
    lines = text.splitlines(keepends=True)
    begins = [0, *accumulate(map(len, lines))]

    def best(count, score):
        fit = (i for i in range(len(lines) - count + 1) if max(map(len, lines[i : i + count])) <= COLUMNS)
        spans = [(begins[i], begins[i + count]) for i in fit]
        return max(spans, key=lambda span: score(*span), default=(0, len(text)))

    def mixture(begin, end):
        counts = wanted[begin:end].bincount(minlength=len(TAGS))
        return min(counts[TAG[name]].item() for name in ("comment", "keyword", "string"))

    wrong = [0, *accumulate((found != wanted).int().tolist())]  # wrong[end] - wrong[begin] errors from begin to end
    mixed, worst = best(MIXED, mixture), best(WORST, lambda begin, end: wrong[end] - wrong[begin])
    right = [accuracy(found[begin:end], wanted[begin:end]) for begin, end in (mixed, worst)]
    return [
        (*mixed, f"Held-out source in predicted colours ({right[0]:.1%} right, errors underlined)"),
        (*worst, f"The {WORST} lines with the most errors ({right[1]:.1%} right)"),
    ]


def show(axes, text: str, found: list[int], wanted: list[int]) -> None:
    """Source in the colours of the predicted tags; wrong ones underlined. One unit is one character, one line."""
    size, family = 10.5, "DejaVu Sans Mono"
    axes.axis("off")
    box = axes.get_window_extent()
    points = 72 / axes.figure.dpi
    axes.set_xlim(0, box.width * points / (0.602 * size))  # a character is 0.602 of the size wide
    axes.set_ylim(text.count("\n") - 0.4, -0.6)
    place = 0
    for row, line in enumerate(text.splitlines(keepends=True)):
        cells = list(zip(range(len(line)), found[place:], wanted[place:]))
        place += len(line)
        for (tag, wrong), run in groupby(cells, key=lambda cell: (cell[1], cell[1] != cell[2])):
            columns = [cell[0] for cell in run]
            name = TAGS[tag]
            axes.text(
                columns[0], row, line[columns[0] : columns[-1] + 1].rstrip("\n").replace("$", r"\$"), size=size,
                color=SHOWN[name], family=family, va="center", weight="bold" if name == "keyword" else None,
            )  # fmt: skip
            if wrong:
                axes.plot([columns[0], columns[-1] + 1], [row + 0.45] * 2, color="#e03131", linewidth=2)


def draw(model, data: Data, losses: list[float], results: dict[str, torch.Tensor], args, path: Path) -> None:
    figure = new_figure(12.6, 6.4)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.7, 1])
    source = grid[:, 0].subgridspec(3, 1, height_ratios=[MIXED, WORST, 1])
    *parts, key = (figure.add_subplot(cell) for cell in source)
    curve, bars = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    found, wanted = list(results.values())[-1], data.held_out[1]

    steps = range(1, len(losses) + 1)
    curve.plot(steps, losses, color=OURS, alpha=0.3, linewidth=0.8)
    curve.plot(steps, smooth(losses, len(losses) // 40), color=OURS, linewidth=2)
    curve.set_yscale("log")
    curve.set_xlabel("step")
    curve.set_ylabel("loss, nats per character")
    title(curve, "Learning")
    for i, (name, tagged) in enumerate(list(results.items())[1:]):
        place = [k + 0.4 * i for k in range(len(TAGS))]
        label = f"{name}: {accuracy(tagged, wanted):.1%} right"
        bars.barh(place, f1(tagged, wanted), height=0.38, color=(GREY, OURS)[i], label=label)
    bars.set_yticks([k + 0.2 for k in range(len(TAGS))], TAGS)
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.set_xlabel("F1 on the held-out files")
    bars.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.2, 1.0))
    tidy(curve, bars)
    figure.suptitle(f"Which part of Python is a character? {setting(args)}", fontsize=12)
    chosen = pieces(data.text, found, wanted)
    for axes, (_, _, headline) in zip(parts, chosen):
        title(axes, headline)
    figure.draw_without_rendering()  # only now the layout has given the axes their widths
    for axes, (begin, end, _) in zip(parts, chosen):
        show(axes, data.text[begin:end], found[begin:end].tolist(), wanted[begin:end].tolist())
    key.axis("off")
    for i, name in enumerate(name for name in SHOWN if name != "space"):
        key.text(i / 6, 0.5, name, transform=key.transAxes, size=11, color=SHOWN[name], weight="bold", va="center")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(
        steps="training steps",
        files="modules of the standard library, a fifth of them held out",
        hidden="hidden size of each direction",
        batch="windows per batch",
        length="characters of a window",
    )
    top = program("Tags every character of Python source by a bidirectional GRU.", sizes, FULL, "tagging.png")
    top.add_argument("--one-way", action="store_true", help="read from left to right only")
    return top


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    data = Data(sources(args.files, args.seed))
    print(f"{len(data.train[0]):,} characters to train on, {len(data.text):,} in files that are held out", flush=True)
    torch.manual_seed(args.seed)
    model = Tagger(data.characters, args.hidden, not args.one_way)
    losses = train(model, data, args)
    results = data.baselines() | {"GRU": predict(model, data.held_out[0], args.length)}
    good = report(results, data.held_out[1], args)
    draw(model, data, losses, results, args, args.output)
    print(f"Picture:    {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
