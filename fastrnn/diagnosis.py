"""What a probe's figures mean, in words: findings, and the summary.

The flow: going back from step t+1 to step t, the gain is the norm of what comes back to t through the recurrence over
the norm of all that there is at t+1; of the gradient of h, or of an LSTM's c, through which it flows. The product of
gains over k steps is what is left of a gradient after k steps, wherever the losses are: with one at the end, it is the
norm of dL/dh itself, up to a factor. Of rows that go no further (`reset` cuts them; a reverse direction has come to
their end) the share is taken off t+1's norm first, as if all had as much.

Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks", name the two ways in which
it fails: the products vanish, or they explode.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass

LIMIT = 3  # orders of magnitude, over a whole sequence, from which on a gradient vanishes or explodes
RECENT = 10  # training steps, the last ones, that are judged: by their median
SATURATED, OFF = 0.7, 0.9  # shares of a gate from which on it is a finding
SPIKE, ENOUGH = 100, 10  # a norm above so many times its median, of so many training steps
LARGE = 100  # root mean square of a state's units


@dataclass(frozen=True)
class Finding:
    """kind: "vanishing", "exploding", "saturated", "spike", "large states", "one step", "not finite", "no gradient"."""

    where: str
    kind: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what} in {self.where}: {self.kind}; {self.advice}"


_VANISHING = {
    "lstm": "try a forget-gate bias of 1 or more (fastrnn.init.forget_bias), or gate biases for dependencies this long "
    "(fastrnn.init.chrono)",
    "gru": "try gate biases for dependencies this long (fastrnn.init.chrono), orthogonal recurrent weights "
    "(fastrnn.init.orthogonal)",
    "rnn_tanh": "try LSTM or GRU, orthogonal recurrent weights (fastrnn.init.orthogonal), a ReLU with identity weights "
    "(fastrnn.init.identity)",
}
_VANISHING["rnn_relu"] = _VANISHING["rnn_tanh"]
_EXPLODING = (
    "try clipping its norm (torch.nn.utils.clip_grad_norm_), smaller or orthogonal recurrent weights "
    "(fastrnn.init.orthogonal), a lower learning rate"
)


# ---------------------------------------------------------------------------------------------------- flow


def sequences(record) -> list[list[int]]:
    """The steps of each sequence, from the last that is processed to the first."""
    begins = [*record.starts.nonzero().flatten().tolist(), len(record)]
    found = [list(range(begin, end)) for begin, end in zip(begins, begins[1:])]
    return found if record.reverse else [steps[::-1] for steps in found]


def longest(record) -> list[int]:
    """The steps of the longest sequence in which rows run, from the last that is processed to the first."""
    rows = record.rows.tolist()
    return max(([t for t in steps if rows[t]] for steps in sequences(record)), key=len)


def flow(record) -> list[float]:
    """log10 of what is left of a gradient after 0, 1, ... steps back through the longest sequence, from the last step
    that has one; -inf where nothing is. Empty when no step has one."""
    steps = longest(record)
    here, arrived = record.h_grad, record.h_grad_arrived
    if record.c is not None:
        here, arrived = record.c_grad, record.c_grad_arrived
    here, arrived = here[steps].tolist(), arrived[steps].tolist()
    first = next((i for i, value in enumerate(here) if value), None)
    if first is None:
        return []
    left = [0.0]
    rows, cut = record.rows.tolist(), record.cut.tolist()
    for i in range(first, len(steps) - 1):
        boundary = max(steps[i], steps[i + 1])
        go_on = (rows[boundary] - cut[boundary]) / rows[steps[i]]
        gain = arrived[i + 1] / (here[i] * math.sqrt(go_on)) if here[i] and go_on else 0.0
        left.append(left[-1] + math.log10(gain) if gain > 0 else -math.inf if gain == 0 else gain)
    return left


def _typical(layer) -> list[float]:
    """The flow of the recent training step whose rate is the median; the steps may be of different lengths."""
    recent = [flow(layer.history[number]) for number in sorted(layer.history)[-RECENT:]]
    recent = sorted((f for f in recent if len(f) > 1), key=lambda f: f[-1] / len(f))
    return recent[len(recent) // 2] if recent else []


def reach(left: list[float], share: float = 0.01) -> int | None:
    """After how many steps no more than a share is left; None: more is left to the end."""
    return next((k for k, value in enumerate(left) if value <= math.log10(share)), None)


# ---------------------------------------------------------------------------------------------------- findings


def number(log10: float) -> str:
    """10 to that power: 0.26, 1e-6, 3e8."""
    if log10 == -math.inf:
        return "nothing"
    if -2 <= log10 < 3:
        return f"{10**log10:.0f}" if log10 >= 1 else f"{10**log10:.2g}"
    exponent = math.floor(log10)
    digit = round(10 ** (log10 - exponent))
    return f"{digit}e{exponent}" if digit < 10 else f"1e{exponent + 1}"


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


_UNREACHED = "the loss does not depend on it, or gradients are lost after it (detach(), {})"


def findings(layers, weights, silent=()) -> list[Finding]:
    """silent: names of modules that no backward pass came to."""
    found = [Finding(name, "no gradient", "no gradient arrives", _UNREACHED.format("no_grad()")) for name in silent]
    for layer in layers:
        broken = _not_finite(layer)
        if broken:
            found.append(broken)
            continue
        found += [f for f in (*_flow(layer), *_gates(layer), _states(layer)) if f is not None]
    return found + _spikes(weights)


def _recent(history: dict) -> list:
    """The last (number, value) of a history. What was not finite before, as GradScaler makes happen, was mended."""
    return sorted(history.items())[-RECENT:]


def _not_finite(layer) -> Finding | None:
    for step, record in _recent(layer.history):
        for name in ("h", "c", "h_grad", "c_grad"):
            values = getattr(record, name)
            if values is None or values.isfinite().all():
                continue
            t = int((~values.isfinite()).nonzero()[0])
            what = f"{name} is {values[t]} at time step {t} of training step {step}"
            return Finding(layer.name, "not finite", what, f"try smaller weights or inputs; {_EXPLODING}")
    return None


def _flow(layer):
    left = _typical(layer)
    if not left:
        if all(not record.h_grad.any() for record in layer.history.values()):
            advice = _UNREACHED.format("their numbers end, a ReLU is off")
            yield Finding(layer.name, "no gradient", "no gradient arrives", advice)
        elif all(len(flow(record)) == 1 < len(longest(record)) for record in layer.history.values()):
            what = f"the loss reads the first of {_steps(len(layer.last))} that it takes, and nothing after it,"
            advice = "take the last state, h_n; of a reverse direction, output[-1] is the first step's"
            yield Finding(layer.name, "one step", what, advice)
        return
    over = f"over {_steps(len(left) - 1)}"
    if left[-1] <= -LIMIT:
        what = f"gradients shrink by {number(left[-1])} {over}"
        if left[-1] == -math.inf:
            what = f"gradients shrink to nothing within {_steps(left.index(-math.inf))}"
        yield Finding(layer.name, "vanishing", what, _VANISHING[layer.cell])
    elif left[-1] >= LIMIT:
        yield Finding(layer.name, "exploding", f"gradients grow by {number(left[-1])} {over}", _EXPLODING)


# (gate, which end, share, what that means, what to try)
_SCALE = "try smaller weights or inputs of unit variance"
_STUCK = {
    "lstm": [
        ("f", "low", SATURATED, "the forget gate f is closed", "try fastrnn.init.forget_bias"),
        ("g", "saturated", SATURATED, "the candidate g is at its ends", _SCALE),
        ("o", "low", OFF, "the output gate o is closed", _SCALE),
    ],
    "gru": [
        ("z", "low", SATURATED, "the update gate z keeps nothing", "try fastrnn.init.chrono"),
        ("n", "saturated", SATURATED, "the candidate n is at its ends", _SCALE),
    ],
    "rnn_tanh": [("h", "saturated", SATURATED, "tanh is at its ends", _SCALE)],
    "rnn_relu": [
        ("h", "low", OFF, "ReLU is off", "try a lower learning rate, fastrnn.init.he or fastrnn.init.identity"),
    ],
}


def average(record, values) -> float:
    """Of values of each step, over the rows that run."""
    return float((values * record.rows).sum() / record.rows.sum().clamp(min=1))


def _gates(layer):
    record = layer.last
    for gate, end, limit, what, advice in _STUCK[layer.cell]:
        share = average(record, getattr(record.gates[gate], end))
        if share > limit:
            yield Finding(layer.name, "saturated", f"{what} in {share:.0%} of units and steps", advice)


def _states(layer) -> Finding | None:
    record = layer.last
    for name in ("h", "c"):
        values = getattr(record, name)
        if values is None:
            continue
        width = layer.state_size if name == "h" else layer.hidden_size
        mean = (values / (record.rows * width).clamp(min=1).sqrt()).max().item()
        if mean > LARGE:
            what = f"units of {name} come to {mean:.1e} (root mean square)"
            return Finding(layer.name, "large states", what, "try smaller recurrent weights, a bounded nonlinearity")
    return None


def _spikes(weights) -> list[Finding]:
    found = []
    for name, norms in weights.items():
        broken = next((step for step, norm in _recent(norms) if not math.isfinite(norm)), None)
        if broken is not None:
            what = f"its gradient's norm is {norms[broken]} in training step {broken}"
            found.append(Finding(name, "not finite", what, _EXPLODING))
            continue
        norms = {step: norm for step, norm in norms.items() if math.isfinite(norm)}
        largest, middle = max(norms.values()), statistics.median(norms.values())
        if len(norms) >= ENOUGH and middle and largest > SPIKE * middle:
            step = max(norms, key=norms.get)
            what = (
                f"the gradient's norm is {largest:.1e} in training step {step}, {largest / middle:.0f} times its median"
            )
            found.append(Finding(name, "spike", what, "try clipping it (torch.nn.utils.clip_grad_norm_)"))
    return found


# ---------------------------------------------------------------------------------------------------- in words


def summary(model: str, trained: int, others: list[str], layers, weights, silent=()) -> str:
    if not layers:
        return (
            f"Probe of {model}: no backward pass has reached a layer. Training steps belong inside the `with` block; "
            "what torch.compile captures meanwhile is not watched."
        )
    found = findings(layers, weights, silent)
    steps = "1 training step" if trained == 1 else f"{trained} training steps"
    lines = [f"Probe of {model}, {steps}:"]
    for layer in layers:
        here = [finding for finding in found if finding.where == layer.name]
        lines += ["", f"{layer.name} ({layer.cell}, {layer.hidden_size} units, {len(layer.last)} steps)"]
        lines += [f"  {finding}" for finding in here] or ["  healthy"]
        left = _typical(layer)
        if left and math.isfinite(left[-1]) and abs(left[-1]) < LIMIT:
            lines.append(f"  a gradient is multiplied by {number(left[-1])} over {_steps(len(left) - 1)}")
        elif left and left[-1] <= -LIMIT:
            lines.append(f"  1% of a gradient is left after {_steps(reach(left))}")
        over = functools.partial(average, layer.last)
        gates = (
            f"{name} {over(gate.mean):.2f}, {over(gate.low):.0%} low, {over(gate.high):.0%} high"
            for name, gate in layer.last.gates.items()
        )
        what = "units" if layer.cell.startswith("rnn") else "gates"
        lines.append(f"  {what} (mean, saturated): {'; '.join(gates)}")
    for name in silent:
        lines += ["", name, *(f"  {finding}" for finding in found if finding.where == name)]
    rest = [finding for finding in found if finding.where not in {*silent, *(layer.name for layer in layers)}]
    if rest:
        lines += ["", "weights", *(f"  {finding}" for finding in rest)]
    if others:
        lines += ["", f"Not watched, since not fastrnn's: {', '.join(others)}"]
    return "\n".join(lines)
