"""Remedies for vanishing and exploding gradients, one beside the other, on a task that is nothing but memory.

    python examples/remedies.py              trains nine recurrent networks, compares, draws a picture
    python examples/remedies.py --delay 200  the same with more to remember

The copy task (Hochreiter and Schmidhuber 1997; Arjovsky, Shah and Bengio 2016), cut to one symbol: one of eight symbols
comes first, then nothing for `delay` steps, then a mark, and the network is to name the symbol. Guessing costs log 8 =
2.079 nats. The data are drawn, there is nothing in them but the memory they ask for. Gradients have to come back
through delay + 1 Jacobians (Pascanu, Mikolov and Bengio 2013), which is where the recipes differ:

    tanh, torch's weights            shrinks them by a factor at each step
    orthogonal, clipped by norm      w_hh keeps lengths (Saxe et al. 2014); g <- g * min(1, 1 / |g|)
    ReLU, identity                   keeps its state (Le, Jaitly and Hinton 2015), and explodes as soon as w_hh grows;
                                     not clipped, clipped by value (each entry into [-0.1, 0.1]), and by norm
    LSTM, forget bias 1, chrono      sigmoid(1) = 0.73 is kept at each step; chrono's units keep theirs for 1 to T steps
    GRU, chrono                      (Jozefowicz et al. 2015; Tallec and Ollivier 2018)

`fastrnn.init` makes the weights, `fastrnn.probe` watches the gradients, and `fastrnn.jacobian_spectrum` tells by how
much the best-kept change of a state grows or shrinks at each step.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import fastrnn
from fastrnn import init
from fastrnn.drawing import COLOURS, GREY, new_figure, save, smooth, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

FULL = dict(delay=100, steps=800, hidden=64, batch=32)
QUICK = dict(delay=8, steps=120, hidden=24, batch=16)
SYMBOLS = 8
BASELINE = math.log(SYMBOLS)
LEARNING_RATE = 2e-3
NORM, VALUE = 1.0, 0.1
TEST = 256  # sequences for the figures in the table


@dataclass
class Recipe:
    """A network and how its gradients are clipped; then what came of it."""

    name: str
    make: Callable[[int, int, int], nn.RNNBase]  # of inputs, hidden units and steps
    clip: str | None
    colour: str
    line: str = "-"
    heat_map: bool = False
    losses: list[float] = field(default_factory=list)  # of each training step
    norms: list[float] = field(default_factory=list)  # of its gradient, before it is clipped
    growth: list[float] = field(default_factory=list)  # of the best-kept change of the state, before and after
    probe: fastrnn.Probe | None = None
    test_loss: float = math.nan
    right: float = math.nan


def recipes() -> list[Recipe]:
    blue, red, green, pink, orange, light, black = COLOURS

    def relu(I, H, T):
        return init.identity(fastrnn.RNN(I, H, nonlinearity="relu"))

    return [
        Recipe("tanh", lambda I, H, T: fastrnn.RNN(I, H), None, black, heat_map=True),
        Recipe("tanh, orthogonal, norm", lambda I, H, T: init.orthogonal(fastrnn.RNN(I, H)), "norm", blue, "-", True),
        Recipe("ReLU, identity", relu, None, orange, ":", True),
        Recipe("ReLU, identity, value", relu, "value", orange, "--"),
        Recipe("ReLU, identity, norm", relu, "norm", red),
        Recipe("LSTM, norm", lambda I, H, T: fastrnn.LSTM(I, H), "norm", GREY),
        Recipe("LSTM, forget bias 1, norm", lambda I, H, T: init.forget_bias(fastrnn.LSTM(I, H)), "norm", light),
        Recipe("LSTM, chrono, norm", lambda I, H, T: init.chrono(fastrnn.LSTM(I, H), T), "norm", green, "-", True),
        Recipe("GRU, chrono, norm", lambda I, H, T: init.chrono(fastrnn.GRU(I, H), T), "norm", pink),
    ]


def draw_batch(size: int, delay: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """x (delay + 2, B, SYMBOLS + 1), one-hot: the symbol, zeros, the mark; and which symbols (B,)."""
    symbols = torch.randint(SYMBOLS, (size,), generator=generator)
    x = torch.zeros(delay + 2, size, SYMBOLS + 1)
    x[0, torch.arange(size), symbols] = 1
    x[-1, :, SYMBOLS] = 1
    return x, symbols


class Model(nn.Module):
    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.rnn, self.linear = rnn, nn.Linear(rnn.hidden_size, SYMBOLS)

    def forward(self, x):
        return self.linear(self.rnn(x)[0][-1])


def clip(parameters: list[nn.Parameter], how: str | None) -> float:
    """Clips the gradients, and returns the norm they had."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters]).item()
    if how == "norm":
        nn.utils.clip_grad_norm_(parameters, NORM)
    elif how == "value":
        nn.utils.clip_grad_value_(parameters, VALUE)
    return norm


def growth(model: Model, x: torch.Tensor) -> float:
    """The largest Lyapunov exponent; nan where states have no end."""
    try:
        return fastrnn.jacobian_spectrum(model.rnn, x, k=1).exponents.item()
    except ValueError:
        return math.nan


def train(recipe: Recipe, args: argparse.Namespace, progress: Progress) -> None:
    """Adam, with a learning rate that falls to zero along a straight line; every recipe sees the same batches."""
    torch.manual_seed(args.seed)
    model = Model(recipe.make(SYMBOLS + 1, args.hidden, args.delay + 2))
    parameters = list(model.parameters())
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(args.seed)
    example, _ = draw_batch(4, args.delay, generator)
    recipe.growth.append(growth(model, example))
    with fastrnn.probe(model) as recipe.probe:
        for step in range(args.steps):
            x, symbols = draw_batch(args.batch, args.delay, generator)
            loss = functional.cross_entropy(model(x), symbols)
            optimiser.zero_grad()
            loss.backward()
            recipe.norms.append(clip(parameters, recipe.clip))
            optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / args.steps)
            optimiser.step()
            recipe.losses.append(loss.item())
            progress.update(recipe.name, step + 1, f"loss {loss.item():.3f}  gradient {recipe.norms[-1]:.1e}")
    recipe.growth.append(growth(model, example))
    with torch.no_grad():
        x, symbols = draw_batch(TEST, args.delay, generator)
        logits = model(x)
        recipe.test_loss = functional.cross_entropy(logits, symbols).item()
        recipe.right = (logits.argmax(1) == symbols).double().mean().item()


# ---------------------------------------------------------------------------------------------------- report


def flow(recipe: Recipe) -> float:
    """Of the norm of the gradient by the state (h, and c) after the last step, the part that reaches the state after
    the first, in the first training step."""
    history = recipe.probe.to_dict()["layers"][0]["history"]
    record = history[min(history)]
    h, c = record["h_grad"], record["c_grad"] or [0.0] * len(record["h_grad"])
    return math.hypot(h[0], c[0]) / math.hypot(h[-1], c[-1])


def setting(args: argparse.Namespace) -> str:
    return (
        f"one symbol of {SYMBOLS}, {args.delay} steps ago; {args.hidden} units, {args.steps} steps of {args.batch}, "
        f"seed {args.seed}"
    )


def report(done: list[Recipe], args: argparse.Namespace) -> bool:
    """Prints the figures; False when nothing has learned, or a loss clipped by norm is not finite."""
    header = ["network, start, clipped by", "loss", "right", "largest gradient", "reaches step 1", "exponent", "after"]
    rows = [
        [
            recipe.name,
            f"{recipe.test_loss:.4f}",
            f"{recipe.right:.1%}",
            f"{max(recipe.norms):.1e}",
            f"{flow(recipe):.0e}",
            *(f"{exponent:+.3f}" for exponent in recipe.growth),
        ]
        for recipe in done
    ]
    rows.append(["guessing", f"{BASELINE:.4f}", f"{1 / SYMBOLS:.1%}", "", "", "", ""])
    print_table(f"Remedies: {setting(args)}", header, rows)
    print("Gradients:  the largest norm before clipping; the part of it that reaches the first state, at the start")
    print("Exponent:   log growth per step of the best-kept change of the state, before training and after:")
    print("            1 / -exponent steps until it has shrunk to 1/e; above 0 it explodes; -inf where nothing is kept")
    print(f"\nThe probe of {done[0].name}:\n{done[0].probe.summary()}\n")
    best = min((recipe for recipe in done if math.isfinite(recipe.test_loss)), key=lambda r: r.test_loss, default=None)
    lost = [recipe.name for recipe in done if recipe.clip == "norm" and not math.isfinite(recipe.test_loss)]
    if best is None or best.test_loss > BASELINE / 2 or lost:
        print(
            f"FAULT: expected a loss below {BASELINE / 2:.2f} from the best and finite ones from all clipped by norm."
        )
        return False
    print(f"Best:       {best.name}, {best.test_loss:.4f} where guessing costs {BASELINE:.4f}")
    return True


def draw(done: list[Recipe], args: argparse.Namespace, path: Path) -> None:
    """Losses, and what the probes saw: gradients over the distance from the loss, and over all of training."""
    figure = new_figure(12, 8)
    grid = figure.add_gridspec(2, 4, height_ratios=[1.25, 1])
    curve, distance = figure.add_subplot(grid[0, :2]), figure.add_subplot(grid[0, 2:])
    for recipe in done:
        bold = smooth(recipe.losses, args.steps // 60)
        curve.plot(bold, color=recipe.colour, linestyle=recipe.line, linewidth=1.8, label=recipe.name)
        before = len(distance.lines)
        recipe.probe.draw_flow(distance, label=recipe.name, color=recipe.colour)
        for line in distance.lines[before:]:
            line.set_linestyle(recipe.line)
    curve.axhline(BASELINE, color=GREY, linewidth=1, linestyle=":")
    curve.set_yscale("log")
    lowest = min(min(recipe.losses) for recipe in done)
    curve.set_ylim(max(1e-4, lowest / 2) if lowest == lowest else 1e-4, 50)
    curve.set_xlabel("training step")
    curve.set_ylabel("loss, nats")
    figure.legend(*curve.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    if distance.get_legend():
        distance.get_legend().remove()
    title(curve, f"Loss (dotted: guessing, {BASELINE:.2f})")
    distance.set_ylim(bottom=1e-30)
    title(distance, "Gradient flow at the end of training")
    tidy(curve)
    for i, recipe in enumerate(recipe for recipe in done if recipe.heat_map):
        axes = figure.add_subplot(grid[1, i])
        recipe.probe.draw_heat_map(axes)
        title(axes, f"dL/dh: {recipe.name}")
    figure.suptitle(f"Remedies for gradients that vanish and explode: {setting(args)}", fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(
        delay="steps between the symbol and the mark",
        steps="training steps of each recipe",
        hidden="hidden size",
        batch="sequences per batch",
    )
    return program("Remedies for vanishing and exploding gradients, side by side.", sizes, FULL, "remedies.png")


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    done = recipes()
    print(f"{setting(args)[0].upper()}{setting(args)[1:]}, Adam with {LEARNING_RATE:g} falling to 0.", flush=True)
    with Progress({recipe.name: args.steps for recipe in done}) as progress:
        for recipe in done:
            train(recipe, args, progress)
    good = report(done, args)
    draw(done, args, args.output)
    print(f"Picture:    {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
