"""A recurrent network small enough to follow by hand: every number of its forward pass and of its gradients.

    python examples/worked_example.py     prints and checks all of them, draws the unrolled network with its numbers

Two inputs, two ReLU units, one linear output, three steps, squared error at the last one (T = 3):

    a_t = W_ih x_t + W_hh h_{t-1} + b      h_t = max(0, a_t)      h_0 = 0
    y   = w . h_T + c                      L   = (y - target)^2 / 2

Back-propagation through time (Werbos 1990, "Backpropagation through time: what it does and how to do it") is the chain
rule from the end to the beginning. [a > 0] is 1 where a unit is on, and 0 where ReLU has cut it off:

    dL/dy   = y - target                   dw   = dL/dy h_T          dc   = dL/dy
    dL/dh_T = w dL/dy                      dL/dh_t = W_hh' dL/da_{t+1}       for t < T
    dL/da_t = dL/dh_t [a_t > 0]
    dW_ih   = sum_t dL/da_t x_t'           dW_hh = sum_t dL/da_t h_{t-1}'    db = sum_t dL/da_t

The same gradients are sums over paths: each way from a number to the loss contributes the product of what it passes.
All of this is written out below in plain Python. It is held against fastrnn.RNN and nn.Linear in float64, against
fastrnn step by step with weights of each step's own (their gradients are the shares of the sums above), and against
finite differences.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn

import fastrnn
from fastrnn.drawing import GREY, OURS, THEIRS, new_figure, save
from fastrnn.terminal import launch, picture, print_table

# Halves and whole numbers, so that every number below is short and exact. Unit 2 is off at step 2.
INPUTS = [[1.0, -1.0], [1.0, 2.0], [2.0, 1.0]]
TARGET = 0.5
WEIGHTS = {
    "W_ih": [[1.0, 0.5], [0.5, -1.0]],
    "W_hh": [[-0.5, 0.5], [0.5, -1.0]],
    "b": [[0.5], [-0.5]],
    "w": [[-1.0, 1.0]],
    "c": [[-0.5]],
}
SHAPES = {name: (len(rows), len(rows[0])) for name, rows in WEIGHTS.items()}
LEARNING_RATE = 0.05
UNITS = (0, 1)
STEPS = range(len(INPUTS))
EXACT, DIFFERENCE, EPSILON = 1e-12, 1e-8, 1e-5  # limits of relative differences; the step of finite differences


# ---------------------------------------------------------------------------------------------------- by hand


def forward(weights: dict, inputs=INPUTS, target=TARGET) -> dict:
    """All numbers of the forward pass; h[0] is h_0, so h[t + 1] belongs to a[t]."""
    W_ih, W_hh, b, w, c = (weights[name] for name in WEIGHTS)
    n = {"input part": [], "recurrent part": [], "a": [], "h": [[0.0, 0.0]]}
    for x in inputs:
        h = n["h"][-1]
        n["input part"].append([W_ih[i][0] * x[0] + W_ih[i][1] * x[1] for i in UNITS])
        n["recurrent part"].append([W_hh[i][0] * h[0] + W_hh[i][1] * h[1] for i in UNITS])
        n["a"].append([n["input part"][-1][i] + n["recurrent part"][-1][i] + b[i][0] for i in UNITS])
        n["h"].append([max(0.0, a) for a in n["a"][-1]])
    n["y"] = w[0][0] * n["h"][-1][0] + w[0][1] * n["h"][-1][1] + c[0][0]
    n["loss"] = (n["y"] - target) ** 2 / 2
    return n


def backward(weights: dict, n: dict, inputs=INPUTS, target=TARGET) -> dict:
    """Back-propagation through time; dh[t] and da[t] belong to a[t]. The shares are lists over the steps."""
    W_hh, w = weights["W_hh"], weights["w"]
    dy = n["y"] - target
    dh = [w[0][i] * dy for i in UNITS]
    g = {"dy": dy, "dh": [], "da": []}
    for t in reversed(range(len(inputs))):
        da = [dh[i] if n["a"][t][i] > 0 else 0.0 for i in UNITS]
        g["dh"].insert(0, dh)
        g["da"].insert(0, da)
        dh = [W_hh[0][j] * da[0] + W_hh[1][j] * da[1] for j in UNITS]  # what the step before has from this one
    g["dx"] = [[sum(weights["W_ih"][i][j] * da[i] for i in UNITS) for j in UNITS] for da in g["da"]]
    g["shares"] = {
        "W_ih": [[[da[i] * x[j] for j in UNITS] for i in UNITS] for da, x in zip(g["da"], inputs)],
        "W_hh": [[[da[i] * h[j] for j in UNITS] for i in UNITS] for da, h in zip(g["da"], n["h"])],
        "b": [[[da[i]] for i in UNITS] for da in g["da"]],
    }
    g["sums"] = {name: added(shares) for name, shares in g["shares"].items()}
    g["sums"] |= {"w": [[dy * n["h"][-1][i] for i in UNITS]], "c": [[dy]]}
    return g


def added(matrices: list) -> list:
    return [[sum(cells) for cells in zip(*rows)] for rows in zip(*matrices)]


def paths(weights: dict, n: dict, dy: float, t: int, unit: int):
    """(units, product) for every path from h of a unit at step t to the loss: units[0] at t, units[-1] at the last."""
    last = len(n["a"]) - 1
    for after in itertools.product(UNITS, repeat=last - t):
        units = (unit, *after)
        product = dy * weights["w"][0][units[-1]]
        for s in range(t + 1, last + 1):
            gate = 1.0 if n["a"][s][units[s - t]] > 0 else 0.0
            product *= gate * weights["W_hh"][units[s - t]][units[s - t - 1]]  # the Jacobian's element: one edge
        yield units, product


def by_paths(weights: dict, n: dict, dy: float, inputs=INPUTS) -> dict:
    """Every dL/dh_t, and the gradients of the recurrent part's weights, as sums over paths and nothing else."""
    steps = range(len(inputs))
    dh = [[sum(p for _, p in paths(weights, n, dy, t, i)) for i in UNITS] for t in steps]
    gate = [[float(a > 0) for a in row] for row in n["a"]]

    def through(i, value):  # a weight's own edge at step t: what it multiplies, the gate behind it, every path onwards
        return sum(value(t) * gate[t][i] * p for t in steps for _, p in paths(weights, n, dy, t, i))

    return {
        "dh": dh,
        "W_ih": [[through(i, lambda t, j=j: inputs[t][j]) for j in UNITS] for i in UNITS],
        "W_hh": [[through(i, lambda t, j=j: n["h"][t][j]) for j in UNITS] for i in UNITS],
        "b": [[through(i, lambda t: 1.0)] for i in UNITS],
    }


def changed(weights: dict, name: str, i: int, j: int, by: float) -> dict:
    rows = [list(row) for row in weights[name]]
    rows[i][j] += by
    return weights | {name: rows}


def finite_differences(weights: dict) -> dict:
    """(L(p + e) - L(p - e)) / 2e for every parameter p."""

    def slope(name, i, j):
        up, down = (forward(changed(weights, name, i, j, by))["loss"] for by in (EPSILON, -EPSILON))
        return (up - down) / (2 * EPSILON)

    return {name: [[slope(name, i, j) for j in range(m)] for i in range(k)] for name, (k, m) in SHAPES.items()}


def descended(weights: dict, gradients: dict) -> dict:
    """One step of gradient descent."""
    return {
        name: [[p - LEARNING_RATE * g for p, g in zip(row, grad)] for row, grad in zip(rows, gradients[name])]
        for name, rows in weights.items()
    }


# ---------------------------------------------------------------------------------------------------- by fastrnn


def modules(weights: dict) -> tuple[fastrnn.RNN, nn.Linear]:
    """The same network from modules. They have two biases, b_ih and b_hh, which are added: here b_hh = 0."""
    rnn, linear = fastrnn.RNN(2, 2, nonlinearity="relu").double(), nn.Linear(2, 1).double()
    values = (weights["W_ih"], weights["W_hh"], weights["b"], [[0.0], [0.0]], weights["w"], weights["c"])
    with torch.no_grad():
        for parameter, value in zip((*rnn.parameters(), *linear.parameters()), values):
            parameter.copy_(torch.tensor(value, dtype=torch.float64).view_as(parameter))
    return rnn, linear


def at_once(weights: dict) -> dict:
    """The whole sequence in one call, and autograd."""
    rnn, linear = modules(weights)
    x = torch.tensor(INPUTS, dtype=torch.float64, requires_grad=True)
    output, _ = rnn(x)
    y = linear(output[-1])
    loss = (y - TARGET).square().sum() / 2
    loss.backward()
    gradients = {
        "W_ih": rnn.weight_ih_l0.grad, "W_hh": rnn.weight_hh_l0.grad, "b": rnn.bias_ih_l0.grad[:, None],
        "w": linear.weight.grad, "c": linear.bias.grad[:, None],
    }  # fmt: skip
    return {"h": output, "y": y, "loss": loss, "sums": gradients, "b_hh": rnn.bias_hh_l0.grad[:, None], "dx": x.grad}


def step_by_step(weights: dict) -> dict:
    """One call for each step, with copies of the weights: a copy's gradient is that step's share."""
    rnn, linear = modules(weights)
    h, states, copies = torch.zeros(1, 2, dtype=torch.float64), [], []
    for x in torch.tensor(INPUTS, dtype=torch.float64):
        own = [p.detach().clone().requires_grad_() for p in rnn.parameters()]
        _, h = fastrnn.functional.rnn(x[None], h, own, nonlinearity="relu")
        h.retain_grad()
        states.append(h)
        copies.append(own)
    ((linear(h[0]) - TARGET).square().sum() / 2).backward()
    W_ih, W_hh, b = ([own[k].grad for own in copies] for k in range(3))
    return {
        "h": torch.cat(states), "dh": torch.cat([h.grad for h in states]), "da": torch.stack(b),
        "shares": {"W_ih": torch.stack(W_ih), "W_hh": torch.stack(W_hh), "b": torch.stack(b)[..., None]},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- checks


def numbers(tree) -> list[float]:
    """All numbers in nested dictionaries, lists and tensors, in order."""
    if isinstance(tree, dict):
        tree = [tree[name] for name in sorted(tree)]
    if isinstance(tree, torch.Tensor):
        tree = tree.detach().flatten().tolist()
    return [n for part in tree for n in numbers(part)] if isinstance(tree, list) else [tree]


def checks(weights: dict = WEIGHTS) -> list[tuple[str, object, object, float]]:
    """(what and against what, by hand, the other, limit)"""
    n = forward(weights)
    g = backward(weights, n)
    once, steps, tracks = at_once(weights), step_by_step(weights), by_paths(weights, n, g["dy"])
    values = [n["h"][1:], n["y"], n["loss"]], [once["h"], once["y"], once["loss"]]
    gradients = [g["sums"], g["sums"]["b"], g["dx"]], [once["sums"], once["b_hh"], once["dx"]]
    recurrent = {name: g["sums"][name] for name in ("W_ih", "W_hh", "b")}
    return [
        ("forward pass: fastrnn.RNN, one call", *values, EXACT),
        ("gradients: fastrnn.RNN, one call", *gradients, EXACT),
        ("dL/dh, dL/da: fastrnn, step by step", [g["dh"], g["da"]], [steps["dh"], steps["da"]], EXACT),
        ("each step's shares: fastrnn, step by step", g["shares"], steps["shares"], EXACT),
        ("dL/dh, gradients: sums over paths", [g["dh"], recurrent], [tracks.pop("dh"), tracks], EXACT),
        ("gradients: finite differences", g["sums"], finite_differences(weights), DIFFERENCE),
    ]


def judge(found: list) -> tuple[list[list[str]], bool]:
    """The lines of the table of checks, and whether all hold; differences relative to numbers above 1."""
    rows, good = [], True
    for name, hand, other, limit in found:
        a, b = numbers(hand), numbers(other)
        if len(a) != len(b):
            raise ValueError(f"{name}: expected {len(a)} numbers, got {len(b)}")
        gaps = [abs(p - q) / max(1.0, abs(p)) for p, q in zip(a, b)]
        holds = all(gap <= limit for gap in gaps)  # not max(gaps) <= limit: max overlooks nan
        good &= holds
        rows.append([name, str(len(a)), f"{max(gaps):.1e}", f"{limit:.0e}", "holds" if holds else "▼ fails"])
    return rows, good


# ---------------------------------------------------------------------------------------------------- printed


def short(value: float) -> str:
    return f"{value + 0.0:.4f}".rstrip("0").rstrip(".")  # + 0.0: no minus zero


def vector(values) -> str:
    return "(" + ", ".join(map(short, values)) + ")"


def matrix(rows) -> str:
    return "[" + "; ".join(", ".join(map(short, row)) for row in rows) + "]"


def print_forward(n: dict) -> None:
    header = ["forward", "x_t", "W_ih x_t", "W_hh h_{t-1}", "+ b = a_t", "on", "h_t"]
    rows = []
    for t in STEPS:
        parts = (INPUTS[t], n["input part"][t], n["recurrent part"][t], n["a"][t])
        on = ", ".join("on" if a > 0 else "OFF" for a in n["a"][t])
        rows.append([f"t = {t + 1}", *map(vector, parts), on, vector(n["h"][t + 1])])
    print_table("Forward: " + ", ".join(f"{k} = {matrix(v)}" for k, v in WEIGHTS.items()), header, rows)
    print(f"y = w . h_3 + c = {short(n['y'])}    L = (y - {TARGET})^2 / 2 = {short(n['loss'])}\n")


def print_backward(n: dict, g: dict) -> None:
    header = ["backward", "dL/dh_t", "on", "dL/da_t", "dW_ih: da x'", "dW_hh: da h_{t-1}'", "db: da"]
    rows = []
    for t in reversed(STEPS):
        on = ", ".join("on" if a > 0 else "OFF" for a in n["a"][t])
        shares = (matrix(g["shares"][name][t]) for name in ("W_ih", "W_hh", "b"))
        rows.append([f"t = {t + 1}", vector(g["dh"][t]), on, vector(g["da"][t]), *shares])
    rows.append(["sum", "", "", "", *(matrix(g["sums"][name]) for name in ("W_ih", "W_hh", "b"))])
    print_table(f"Backward: dL/dy = y - {TARGET} = {short(g['dy'])}", header, rows)
    print(f"dw = dL/dy h_3' = {matrix(g['sums']['w'])}    dc = dL/dy = {short(g['dy'])}\n")


def print_paths(n: dict, g: dict) -> None:
    rows = []
    for unit in UNITS:
        for units, product in paths(WEIGHTS, n, g["dy"], 0, unit):
            factors = [f"dL/dy {short(g['dy'])}", f"w[{units[-1] + 1}] {short(WEIGHTS['w'][0][units[-1]])}"]
            for t in reversed(range(1, len(units))):
                to, start = units[t], units[t - 1]
                factors.append(f"{'on' if n['a'][t][to] > 0 else 'OFF'} {int(n['a'][t][to] > 0)}")
                factors.append(f"W_hh[{to + 1},{start + 1}] {short(WEIGHTS['W_hh'][to][start])}")
            way = " -> ".join(f"h_{t + 1}[{u + 1}]" for t, u in enumerate(units))
            rows.append([f"{way} -> y", " * ".join(factors), short(product)])
        rows.append([f"dL/dh_1[{unit + 1}]: the sum", "", short(g["dh"][0][unit])])
    print_table("Every path from the first step's state to the loss", ["path", "product of its edges", "is"], rows)


# ---------------------------------------------------------------------------------------------------- drawn


def draw(n: dict, g: dict, path: Path) -> None:
    """The unrolled network: forward values in blue, what comes back in orange below them; what is cut off in grey."""
    from matplotlib.patches import Circle, FancyArrowPatch

    figure = new_figure(14.5, 7.6)
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.axis("off")
    radius = 0.52
    white = dict(boxstyle="square,pad=0.14", facecolor="white", edgecolor="none")

    def place(t, unit):
        return 5.0 * t, (4.6, 1.9)[unit]

    def node(x, y, above, below, on=True, face="#e7f0f9"):
        style = dict(facecolor=face if on else "#e9ecef", edgecolor=OURS if on else GREY, linewidth=1.6)
        axes.add_patch(Circle((x, y), radius, zorder=3, linestyle="-" if on else "--", **style))
        axes.text(x, y + 0.17, above, ha="center", va="center", color=OURS, fontsize=11, weight="bold", zorder=4)
        axes.text(x, y - 0.19, below, ha="center", va="center", color=THEIRS, fontsize=10, zorder=4)

    def edge(start, end, weight, gradient, at, on=True):
        arrow = FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, zorder=1, linewidth=1.2,
            color="#495057" if on else "#ced4da", linestyle="-" if on else "--",
        )  # fmt: skip
        length = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
        cut = [(p - q) / length * radius for p, q in zip(end, start)]
        arrow.set_positions((start[0] + cut[0], start[1] + cut[1]), (end[0] - cut[0], end[1] - cut[1]))
        axes.add_patch(arrow)
        x, y = (p + at * (q - p) for p, q in zip(start, end))
        for dy, value, colour in ((0.09, weight, OURS), (-0.09, gradient, THEIRS)):
            style = dict(fontsize=9.5, color=colour if on else GREY, bbox=white, zorder=2)
            axes.text(x, y + dy, short(value), ha="center", va="center", **style)

    last = len(INPUTS) - 1
    for t in STEPS:
        for j in UNITS:
            x, y = 5.0 * t + (-1.7, 1.7)[j], -0.9
            node(x, y, short(INPUTS[t][j]), short(g["dx"][t][j]), face="white")
            axes.text(x, y - 0.68, f"$x_{t + 1}[{j + 1}]$", ha="center", va="top", fontsize=10)
            for i in UNITS:
                on = n["a"][t][i] > 0
                share = g["shares"]["W_ih"][t][i][j]
                edge((x, y), place(t, i), WEIGHTS["W_ih"][i][j], share, 0.24 if i == 0 else 0.56, on)
        for i in UNITS:
            x, y = place(t, i)
            on = n["a"][t][i] > 0
            node(x, y, short(n["h"][t + 1][i]), short(g["dh"][t][i]), on)
            off = "" if on else ": OFF"
            name = f"a_{t + 1}[{i + 1}]"
            for up, text, colour in (
                (0.98, f"${name}$ = {short(n['a'][t][i])}{off}", OURS),
                (0.7, f"$\\partial L/\\partial {name}$ = {short(g['da'][t][i])}", THEIRS),
            ):
                axes.text(x, y + up, text, ha="center", va="center", fontsize=10, color=colour, bbox=white, zorder=2)
            if t < last:
                for k in UNITS:
                    on_after = n["a"][t + 1][k] > 0
                    share = g["shares"]["W_hh"][t + 1][k][i]
                    at = 0.5 if i == k else 0.3
                    edge((x, y), place(t + 1, k), WEIGHTS["W_hh"][k][i], share, at, on and on_after)
    out = 5.0 * last + 3.6, 3.25
    for i in UNITS:
        edge(place(last, i), out, WEIGHTS["w"][0][i], g["sums"]["w"][0][i], 0.5)
    node(*out, short(n["y"]), short(g["dy"]), face="white")
    axes.text(out[0], out[1] + 0.72, "$y$", ha="center", fontsize=11)
    lines = f"target {TARGET}\n$L$ = {short(n['loss'])}"
    axes.text(out[0], out[1] - 0.8, lines, ha="center", va="top", fontsize=11)
    axes.set_xlim(-2.4, out[0] + 1.1)
    axes.set_ylim(-2.1, 5.9)
    key = "in nodes: value, below it dL/d(value)      on edges: weight, below it this step's share of its gradient"
    axes.text(0.5, 0.0, key, transform=axes.transAxes, ha="center", va="top", fontsize=10.5, color="#495057")
    biases = f"b = {vector(row[0] for row in WEIGHTS['b'])}, c = {short(WEIGHTS['c'][0][0])}"
    headline = f"Forward (blue) and back through time (orange); dashed: cut off by ReLU; {biases}"
    figure.suptitle(headline, fontsize=13)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(description="A recurrent network with every number of its gradients, checked.")
    default = "worked_example.png"
    top.add_argument("--output", type=picture, default=default, metavar="PNG", help=f"the picture (default: {default})")
    args = top.parse_args(argv)
    n = forward(WEIGHTS)
    g = backward(WEIGHTS, n)
    print_forward(n)
    print_backward(n, g)
    print_paths(n, g)
    rows, good = judge(checks())
    print_table("By hand, and by others", ["what, against what", "numbers", "largest difference", "limit", ""], rows)
    if not any(a <= 0 for row in n["a"] for a in row):
        good = False
        print("FAULT: no unit is cut off, so nothing shows what ReLU does to gradients.")
    after = forward(descended(WEIGHTS, g["sums"]))
    print(f"One step of gradient descent, learning rate {LEARNING_RATE}: L = {n['loss']:.4f} -> {after['loss']:.4f}")
    draw(n, g, args.output)
    print(f"Picture:    {args.output}")
    if not (good and after["loss"] < n["loss"]):
        print("FAULT: numbers that have to agree do not, or the step has not lowered the loss.")
        return 1
    return 0


if __name__ == "__main__":
    launch(main)
