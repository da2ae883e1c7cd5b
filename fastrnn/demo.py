"""`python -m fastrnn demo`: one character language model, trained twice from one seed, on torch.nn and on fastrnn.

Both models start from the same weights and see the same batches, so the two loss curves must lie on each other; what
may differ is the time. They are trained in alternating blocks of steps, the order inside each pair of blocks drawn at
random, so that a machine which slows down or speeds up meanwhile does so for both. The time of a model is the sum of
its own step times.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import statistics
import textwrap
import time
from pathlib import Path

import torch
from torch import nn

import fastrnn
from fastrnn.drawing import OURS, THEIRS, new_figure, save, smooth, tidy, title
from fastrnn.terminal import Progress, positive, print_table, rich_console, settle

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
FULL = dict(steps=400, hidden=256, layers=2, batch=32, length=64)
QUICK = dict(steps=40, hidden=64, layers=2, batch=16, length=32)
EMBEDDING, LEARNING_RATE, CLIP = 64, 4e-3, 1.0
PROMPT = "The "  # of the sample; where the text lacks one of these characters, the start of the held-out text
BLOCK = 5  # steps of one model before the other has its turn
SECONDS = 150  # training stops here on a machine slower than expected, after the same step for both
HELD_OUT = 0.1  # the last tenth of the text is never trained on
DRIFT = 1e-4  # a difference of losses (nats) above this counts as visible
EDGE = 1e-8  # the picture shows differences down to here
EARLY, EARLY_LIMIT = 10, 1e-3  # in the first ten steps rounding cannot have grown: a larger difference is a fault


class BadArgument(ValueError):
    """The command line asks for something that cannot be done: printed as one line, exit code 2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", choices=CELLS, default="lstm", help="which RNN (default: lstm)")
    parser.add_argument("--text", metavar="FILE", help="train on this UTF-8 file (default: Python's own help topics)")
    for name, what in dict(
        steps="training steps of each model",
        hidden="hidden size",
        layers="layers",
        batch="sequences per batch",
        length="characters per sequence",
    ).items():
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=f"{what} (default: {FULL[name]})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and sample (default: 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--out", default="fastrnn-demo.png", metavar="PNG", help="the picture (default: fastrnn-demo.png)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model for a few seconds: shows that it runs, not how fast"
    )


# ---------------------------------------------------------------------------------------------------- data


def read_text(path: str | None, length: int) -> str:
    """The text to learn: the file at `path`, or Python's help topics, real English that every CPython carries."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    least = math.ceil((length + 1) / HELD_OUT) + 1  # so that the held-out part holds one sequence
    expected = f"argument --text: expected a UTF-8 text file of at least {least} characters (ten times --length)"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadArgument(f"{expected}, got {path!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadArgument(f"{expected}, got {path!r}: byte {error.start} is not UTF-8") from None
    if len(text) < least:
        raise BadArgument(f"{expected}, got {path!r} with {len(text)} characters")
    return text


class Text:
    """The text as character numbers, split into a part to train on and a held-out part."""

    def __init__(self, text: str, length: int):
        self.characters = sorted(set(text))
        number = {c: i for i, c in enumerate(self.characters)}
        data = torch.tensor([number[c] for c in text])
        split = len(data) - max(int(len(data) * HELD_OUT), length + 1)
        self.train, self.held_out, self.length = data[:split], data[split:], length

    def batches(self, steps: int, batch: int, seed: int):
        """Batch number i -> (input, target), each (T, B); the same for both models."""
        starts = torch.randint(
            len(self.train) - self.length, (steps, batch), generator=torch.Generator().manual_seed(seed)
        )
        within = torch.arange(self.length + 1)

        def get(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            window = self.train[starts[step] + within[:, None]]
            return window[:-1], window[1:]

        return get

    def validation(self, most: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
        """(input, target) of up to `most` sequences, evenly spread over the held-out text."""
        n = min(most, (len(self.held_out) - 1) // self.length)
        starts = torch.linspace(0, len(self.held_out) - self.length - 1, n).long()
        window = self.held_out[starts + torch.arange(self.length + 1)[:, None]]
        return window[:-1], window[1:]

    def decode(self, numbers: list[int]) -> str:
        return "".join(self.characters[i] for i in numbers)


# ---------------------------------------------------------------------------------------------------- model


class CharacterModel(nn.Module):
    """Embedding -> RNN -> linear: the logits of the next character, (T, B, characters)."""

    def __init__(self, rnn_class: type[nn.RNNBase], characters: int, hidden: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.rnn = rnn_class(EMBEDDING, hidden, layers)
        self.linear = nn.Linear(hidden, characters)

    def forward(self, numbers, hx=None):
        output, hx = self.rnn(self.embedding(numbers), hx)
        return self.linear(output), hx

    def loss(self, numbers, target):
        logits, _ = self(numbers)
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


class Trainee:
    """A model with its optimiser, its loss curve (nats per character) and the seconds each step took."""

    def __init__(self, rnn_class: type[nn.RNNBase], args: argparse.Namespace, characters: int):
        self.name = f"{'fastrnn' if rnn_class.__module__.startswith('fastrnn') else 'torch.nn'}.{rnn_class.__name__}"
        torch.manual_seed(args.seed)
        self.model = CharacterModel(rnn_class, characters, args.hidden, args.layers)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def prepare(self, batch) -> None:
        """One untimed step on a throw-away copy (first-call costs are not training); then the real one's optimiser."""
        model, self.model = self.model, copy.deepcopy(self.model)
        self.start()
        self.step(batch)
        self.model, self.losses, self.seconds = model, [], []
        self.start()

    def start(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, batch) -> None:
        begin = time.perf_counter()
        loss = self.model.loss(*batch)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)

    def final(self) -> float:
        """The mean loss of the last tenth of the steps: one step says more about its batch than about the model."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)

    @torch.no_grad()
    def validate(self, data: Text) -> float:
        return self.model.loss(*data.validation()).item()


def train(trainees: list[Trainee], batch, args: argparse.Namespace) -> None:
    order, deadline, tokens = random.Random(args.seed), time.monotonic() + SECONDS, args.batch * args.length
    for trainee in trainees:
        trainee.prepare(batch(0))
    pair = 0.0  # seconds that the last pair of blocks took: the next one has to fit as well
    with Progress({trainee.name: args.steps for trainee in trainees}) as progress:
        for begin in range(0, args.steps, BLOCK):
            end, now = min(begin + BLOCK, args.steps), time.monotonic()
            for trainee in order.sample(trainees, len(trainees)):
                for step in range(begin, end):
                    trainee.step(batch(step))
                rate = tokens * (end - begin) / sum(trainee.seconds[begin:end])
                progress.update(trainee.name, end, f"loss {trainee.losses[-1]:.3f}  {rate:>7,.0f} tokens/s")
            pair = time.monotonic() - now
            if now + 2 * pair > deadline and end < args.steps:
                break
    done = len(trainees[0].losses)
    if done < args.steps:
        print(f"Stopped after {done} of {args.steps} steps of each model: {SECONDS} s of training are over.")


@torch.no_grad()
def generate(trainee: Trainee, data: Text, seed: int, characters: int, temperature: float = 0.6) -> tuple[str, str]:
    """(prompt, continuation): character by character, the state handed on from call to call."""
    generator = torch.Generator().manual_seed(seed)
    known = set(PROMPT) <= set(data.characters)
    prompt = torch.tensor([data.characters.index(c) for c in PROMPT]) if known else data.held_out[: data.length]
    logits, hx = trainee.model(prompt[:, None])
    numbers = []
    for _ in range(characters):
        probabilities = torch.softmax(logits[-1, 0] / temperature, 0)
        numbers.append(torch.multinomial(probabilities, 1, generator=generator))
        logits, hx = trainee.model(numbers[-1][:, None], hx)
    return data.decode(prompt.tolist()), data.decode([int(n) for n in numbers])


# ---------------------------------------------------------------------------------------------------- report


def setting(args: argparse.Namespace) -> str:
    layers = "1 layer" if args.layers == 1 else f"{args.layers} layers"
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    isa = fastrnn.build_info()["isa"]
    batch = f"batch {args.batch} x {args.length} characters"
    return f"{CELLS[args.cell]}, {layers} of {args.hidden}, {batch}, {threads}, {isa}"


def speed_ups(theirs: Trainee, ours: Trainee) -> list[float]:
    """Of each block of steps; their median is the speed-up, which one stall of a busy machine does not move."""
    starts = range(0, len(ours.seconds), BLOCK)
    return [sum(theirs.seconds[i : i + BLOCK]) / sum(ours.seconds[i : i + BLOCK]) for i in starts]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def report(theirs: Trainee, ours: Trainee, validation: list[float], args: argparse.Namespace) -> bool:
    """Prints the figures; False if the curves differ where rounding cannot explain it."""
    steps, tokens = len(ours.losses), args.batch * args.length
    rows = []
    for trainee, held_out in zip((theirs, ours), validation, strict=True):
        seconds = sum(trainee.seconds)
        losses = [f"{loss:.4f}" for loss in (trainee.losses[0], trainee.final(), held_out)]
        bits = f"{held_out / math.log(2):.3f}"
        rows.append([trainee.name, *losses, bits, f"{seconds:.1f}", f"{steps * tokens / seconds:,.0f}"])
    header = ["trained on", "first loss", "final loss", "held-out loss", "bits/character", "seconds", "tokens/s"]
    print_table(f"{setting(args)}, {steps} steps", header, rows)

    gap = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    blocks = speed_ups(theirs, ours)
    middle, low, high = statistics.median(blocks), percentile(blocks, 0.1), percentile(blocks, 0.9)
    print(
        f"Speed-up:           {middle:.2f} (median over blocks of {BLOCK} steps; most lie from {low:.2f} to {high:.2f})"
    )
    print(
        f"Largest difference: {max(gap):.1e} nats along the curve, at step {gap.index(max(gap)) + 1}; "
        f"{max(gap[:EARLY]):.1e} in the first {len(gap[:EARLY])} steps; "
        f"{abs(validation[0] - validation[1]):.1e} held out"
    )
    start = next((i + 1 for i, g in enumerate(gap) if g > DRIFT), None)
    good = all(map(math.isfinite, theirs.losses + ours.losses)) and max(gap[:EARLY]) <= EARLY_LIMIT
    if not good:
        verdict = f"FAULT: a loss is not finite, or the first {EARLY} steps differ by more than {EARLY_LIMIT:g}."
    elif start is None:
        verdict = f"the same curve: no difference above {DRIFT:g} at any step."
    else:
        verdict = (
            f"the same curve up to rounding: at most {DRIFT:g} apart until step {start - 1};\n{'':20}"
            "from there on rounding differences grow chaotically, as they do in torch.nn when one rounding is changed."
        )
    print(f"Verdict:            {verdict}")
    return good


def draw(theirs: Trainee, ours: Trainee, validation: list[float], args: argparse.Namespace, path: Path) -> None:
    """Both loss curves over their own wall-clock time, and their difference step by step."""
    from itertools import accumulate

    from matplotlib.ticker import MaxNLocator

    figure = new_figure(10, 5, dpi=150)
    curve, difference = figure.subplots(1, 2, width_ratios=[1.7, 1])
    reach = len(ours.losses) // 60
    for trainee, held_out, colour in zip((theirs, ours), validation, (THEIRS, OURS), strict=True):
        seconds = list(accumulate(trainee.seconds))
        label = f"{trainee.name}: {seconds[-1]:.1f} s, held-out loss {held_out:.3f}"
        curve.plot(seconds, trainee.losses, color=colour, alpha=0.22, linewidth=0.8)
        bold = smooth(trainee.losses, reach)
        curve.plot(seconds, bold, color=colour, linewidth=2.2, label=label)
        curve.plot(seconds[-1], bold[-1], "o", color=colour, markersize=6)
    curve.set_xlabel("training time, seconds")
    curve.set_ylabel("loss, nats per character")
    bold = f" (bold: mean of {2 * reach + 1} steps)" if reach else ""
    title(curve, f"Loss over training time{bold}")
    curve.set_xlim(left=0)
    curve.legend(frameon=False, loc="upper right", fontsize=10)

    # No difference at all has no place on a logarithmic axis: such steps are shown at the lower edge.
    gap = [max(abs(a - b), EDGE) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    difference.semilogy(range(1, len(gap) + 1), gap, ".", color="#495057", markersize=4, clip_on=False)
    difference.axhline(DRIFT, color="#868e96", linewidth=1, linestyle=":")
    difference.set_ylim(EDGE, max(1e-2, 2 * max(gap)))
    difference.xaxis.set_major_locator(MaxNLocator(integer=True))
    difference.set_xlabel("step")
    difference.set_ylabel(f"nats per character (at the edge: at most {EDGE:g})")
    title(difference, "Difference at the same step")
    tidy(curve, difference)
    middle = statistics.median(speed_ups(theirs, ours))
    headline = f"One model, one seed, trained twice: {ours.name} at {middle:.2f} times the speed of {theirs.name}"
    figure.suptitle(f"{headline}\n{setting(args)}", fontsize=12)
    save(figure, path)


def picture_path(out: str) -> Path | None:
    """Where the picture goes, found out before training and not after it; None without matplotlib."""
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadArgument(f"argument --out: expected a file name in a folder that can be written to, got {out!r}")
    try:
        import matplotlib.figure  # noqa: F401  (its first import may build a font cache: not during training)
    except ImportError:
        print("No picture will be drawn: matplotlib is not installed.")
        return None
    return path


def main(args: argparse.Namespace) -> int:
    settle(args, FULL, QUICK)
    path = picture_path(args.out)
    data = Text(read_text(args.text, args.length), args.length)

    name = CELLS[args.cell]
    theirs, ours = (Trainee(getattr(package, name), args, len(data.characters)) for package in (nn, fastrnn))
    source = args.text or "Python's help topics (pydoc_data.topics)"
    parameters = sum(p.numel() for p in ours.model.parameters())
    print(
        f"Text: {source}: {len(data.train) + len(data.held_out):,} characters, {len(data.characters)} different. "
        f"Model: {parameters:,} parameters."
    )
    print(
        f"{setting(args)}; {args.steps} steps of Adam each, seed {args.seed}, in alternating blocks of {BLOCK}.",
        flush=True,
    )
    train([theirs, ours], data.batches(args.steps, args.batch, args.seed), args)

    validation = [trainee.validate(data) for trainee in (theirs, ours)]
    good = report(theirs, ours, validation, args)
    prompt, text = generate(ours, data, args.seed, 120 if args.quick else 400)
    console = rich_console()
    print(f"\nText written by the {ours.name} model, after the prompt {prompt!r}:")
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 96, drop_whitespace=False) or [""]]
    sample = textwrap.indent("\n".join(lines), "  | ", lambda line: True)
    console.print(sample, style="cyan", markup=False) if console else print(sample)
    if path is not None:
        draw(theirs, ours, validation, args, path)
        print(f"\nPicture: {path}")
    return 0 if good else 1
