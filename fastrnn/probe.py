"""`with fastrnn.probe(model) as probe:` what gradients, states and gates do over time while a model is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrnn import cells, diagnosis, modules, ops, recording

_LAYERS = (nn.RNN, nn.LSTM, nn.GRU)
_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


@dataclass(frozen=True)
class Gate:
    """A gate at every step (T,), over its rows and units: its mean, and the fractions that are low (sigmoid <= 0.1,
    tanh <= -0.9, relu <= 0) and high (sigmoid >= 0.9, tanh >= 0.9; none of a relu). Saturated is low or high."""

    mean: Tensor
    low: Tensor
    high: Tensor

    @property
    def saturated(self) -> Tensor:
        return self.low + self.high


@dataclass(frozen=True)
class Record:
    """One layer in one direction in one training step: float64 tensors (T,), a value for each step, where it lies in
    the input. Norms are over all rows that run at that step, and units.

    rows: how many run. cut: how many of them begin again there, by `reset`. h, c: norms of the states after the step.
    h_grad, c_grad: norms of the gradients of the loss by them, all of it. h_grad_arrived, c_grad_arrived: the part of
    these that came back through the recurrence from the next step (in the order of the direction), and not from the
    layer's output; what comes back to c comes through c and, but for a projected LSTM, through h. starts: bool, where a
    sequence begins, or all its rows again; a layer that was called several times in a training step has its calls one
    behind the other here, each behind the one whose state it was given. c and its
    gradients are None for a cell without one. reverse: the direction goes from the last step to the first.
    """

    rows: Tensor
    h: Tensor
    h_grad: Tensor
    h_grad_arrived: Tensor
    c: Tensor | None
    c_grad: Tensor | None
    c_grad_arrived: Tensor | None
    gates: dict[str, Gate]
    starts: Tensor
    cut: Tensor
    reverse: bool

    def __len__(self) -> int:
        return len(self.rows)

    def as_dict(self) -> dict:
        """As lists of numbers."""
        found = {
            name: None if value is None else value.tolist()
            for name, value in vars(self).items()
            if name not in ("gates", "reverse")
        }
        gates = {name: {k: v.tolist() for k, v in vars(gate).items()} for name, gate in self.gates.items()}
        return found | {"gates": gates}


@dataclass(frozen=True)
class Layer:
    """What is known of one layer in one direction: history is {number of the training step: Record}. state_size: the
    units of h, hidden_size or proj_size."""

    module: str
    layer: int
    reverse: bool
    cell: str
    hidden_size: int
    state_size: int
    history: dict[int, Record] = field(repr=False)

    @property
    def name(self) -> str:
        where = f"layer {self.layer}" + (", reverse" if self.reverse else "")
        return f"{self.module} {where}" if self.module else where

    @property
    def last(self) -> Record:
        return self.history[max(self.history)]


class Probe:
    """See `probe`."""

    def __init__(self, model: nn.Module, history: int = 256):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(history, int) or isinstance(history, bool) or history < 2:
            raise ValueError(f"history: expected a whole number of at least 2, got {history!r}")
        watched, self._others, ours = {}, [], _forwards()
        for name, module in model.named_modules():
            if not isinstance(module, (*_LAYERS, *_CELLS)):
                continue
            # A subclass's own forward calls ours, as a rule.
            if any(vars(kind).get("forward") in ours for kind in type(module).__mro__):
                watched[name] = module
            else:
                self._others.append(f"{name or 'model'} ({type(module).__module__}.{type(module).__qualname__})")
        if not watched:
            hint = f", but {', '.join(self._others)}: fastrnn.accelerate(model) converts them" if self._others else ""
            raise ValueError(f"model: expected one with layers or cells of fastrnn, got {type(model).__name__}{hint}")
        self._model = type(model).__name__
        self._recording = recording.Recording(watched, history)

    def __enter__(self) -> Probe:
        self._recording.open()
        return self

    def __exit__(self, *exc) -> None:
        self._recording.close()

    # ------------------------------------------------------------------------------------------------ what was seen

    @property
    def steps(self) -> list[int]:
        """The numbers, from 0, of the training steps that were kept: all of them up to `history`, then evenly spread
        ones, and the last."""
        return [step.number for step in self._recording.steps]

    @property
    def trained(self) -> int:
        """How many training steps there were."""
        return self._recording.trained

    def layers(self) -> list[Layer]:
        """Every layer and direction that a backward pass has reached, in the model's order."""
        found: dict[tuple[int, int], Layer] = {}
        for step in self._recording.steps:
            by_recorder: dict[int, list] = {}
            for call in sorted(step.calls, key=lambda call: call.number):
                by_recorder.setdefault(id(call.recorder), []).append(call)
            for place, recorder in enumerate(self._recording.recorders):
                for row, record in _records(by_recorder.get(id(recorder), [])):
                    module = recorder.module
                    if (place, row) not in found:
                        D = 2 if getattr(module, "bidirectional", False) else 1
                        cell = by_recorder[id(recorder)][0].cell
                        H = module.hidden_size
                        P = getattr(module, "proj_size", 0) or H
                        found[place, row] = Layer(recorder.name, row // D, row % D == 1, cell, H, P, {})
                    found[place, row].history[step.number] = record
        return [found[key] for key in sorted(found)]

    def weights(self) -> dict[str, dict[int, float]]:
        """{name of a parameter: {number of the training step: norm of the gradient that .grad held at the end of the
        backward pass, before clipping}}."""
        found: dict[str, dict[int, float]] = {}
        for step in self._recording.steps:
            for name, norm in step.weights.items():
                found.setdefault(name, {})[step.number] = float(norm)
        return found

    def _silent(self) -> list[str]:
        """The modules that ran to be differentiated, without any backward pass that came to them."""
        return [r.name or "the module" for r in self._recording.recorders if r.begun and not r.reached]

    def findings(self) -> list[diagnosis.Finding]:
        """What is wrong, in no order of weight; empty where nothing is."""
        return diagnosis.findings(self.layers(), self.weights(), self._silent())

    def summary(self) -> str:
        """In words: what flows back through each layer, what is wrong with it, and what to try."""
        return diagnosis.summary(self._model, self.trained, self._others, self.layers(), self.weights(), self._silent())

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict:
        """Everything in numbers, strings and lists: json.dumps takes it (not finite numbers become NaN and Infinity).

        {"model", "trained", "steps": numbers of the training steps that were kept, "layers": [{"name", "module",
        "layer", "reverse", "cell", "hidden_size", "history": {number: the lists of a Record}}], "weights": {name:
        {number: norm}}, "findings": [{"where", "kind", "what", "advice"}]}
        """
        layers = [
            {
                "name": layer.name,
                "module": layer.module,
                "layer": layer.layer,
                "reverse": layer.reverse,
                "cell": layer.cell,
                "hidden_size": layer.hidden_size,
                "history": {number: record.as_dict() for number, record in layer.history.items()},
            }
            for layer in self.layers()
        ]
        return {
            "model": self._model,
            "trained": self.trained,
            "steps": self.steps,
            "layers": layers,
            "weights": self.weights(),
            "findings": [vars(finding) for finding in self.findings()],
        }

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict()), encoding="utf-8")

    # -------------------------------------------------------------------------------------------------- to be seen

    def plot(self, path: str | Path) -> None:
        """A PNG: the norm of gradients over the distance from the loss, norms of states, of weights' gradients over
        training; and for each layer (of more than four, those with the weakest flow) a heat map of the norm of the
        gradient, time step against training step, and how full its gates are. ImportError without matplotlib."""
        from fastrnn import probe_figure

        probe_figure.plot(self, path)

    def draw_flow(self, axes, label: str | None = None, color=None) -> None:
        """The norm of dL/dh (of an LSTM dL/dc) over the distance from the last step, of every layer, onto matplotlib's
        axes; dashed: what is left of the last step's alone. label, color: for a model of one layer."""
        from fastrnn import probe_figure

        probe_figure.flow(axes, self.layers(), label, color)

    def draw_heat_map(self, axes, layer: int = 0) -> None:
        """The norm of dL/dh: time steps across, training steps up. layer: its place in `layers()`."""
        from fastrnn import probe_figure

        probe_figure.heat_map(axes, self.layers()[layer])

    def draw_gates(self, axes, layer: int = 0) -> None:
        """The mean of each gate at each time step of the last training step, and the share that is saturated."""
        from fastrnn import probe_figure

        probe_figure.gates(axes, self.layers()[layer])

    def draw_states(self, axes) -> None:
        """Norms of h (and c, dashed) for one row, at each time step of the last training step."""
        from fastrnn import probe_figure

        probe_figure.states(axes, self.layers())

    def to_tensorboard(self, writer) -> None:
        """Writes scalars for each training step that was kept, the plot and the summary to TensorBoard.

        writer: a torch.utils.tensorboard.SummaryWriter, or the folder for one. ImportError without tensorboard.
        """
        from fastrnn import probe_figure

        probe_figure.to_tensorboard(self, writer)


def probe(model: nn.Module, *, history: int = 256) -> Probe:
    """Watches the training of a model's fastrnn layers and cells: a context manager.

    While it is open, every backward pass writes down for every layer, direction and time step: the norms of the state h
    (c) and of the gradient of the loss by it, gate means and how many are saturated; and the norm of each weight's
    gradient. The kernels sum it up as they go; nothing runs step by step in Python, and results are the same bits. What
    was seen stays readable after the context is left.

        with fastrnn.probe(model) as probe:
            for batch in data:
                ...  # forward, backward, optimiser, as ever
        print(probe.summary())      # "gradients shrink by 1e-06 over 50 steps in rnn layer 0: vanishing; try ..."
        probe.plot("probe.png")

    A training step is one backward pass, with all forward calls up to its end; so each micro-batch of an accumulated
    gradient is one. A layer that is called several times in it (a cell; a sequence cut into pieces) has its calls one
    behind the other, as one sequence where a state was handed on; of two backward passes through one call, the later
    one stays. Norms are Frobenius norms over rows and units, of gradients as they come (under a GradScaler, scaled). A
    model is to be trained by one thread.

    On devices whose kernels cannot do this yet (all but the CPU) watched calls run step by step through torch's
    operations: the same numbers up to rounding, slowly. What was compiled runs eagerly while a probe is open. Calls
    under torch.func transforms, by replicas of nn.DataParallel, and what is first compiled meanwhile, are not watched.
    Of layers with recompute=True, calls whose rows end at different steps keep all for backward meanwhile.

    Args:
        model: with RNN, LSTM, GRU or their cells, of fastrnn, or torch.nn's under `fastrnn.patch()`.
        history: the training steps that are kept at most (and 256 MiB): evenly spread over the training.

    Raises:
        TypeError, ValueError: for a model that is none, or has no layer to be watched. RuntimeError on entering, when
            another open probe watches one of them.
    """
    return Probe(model, history)


def _forwards():
    """The forwards that are ours; under patch() torch.nn's own classes have them."""
    return {modules.forward, *(c.forward for c in (cells.RNNCell, cells.LSTMCell, cells.GRUCell))}


def _records(calls: list):
    """(layer * directions + direction, Record) of one module's calls in one training step."""
    rows: dict[int, list] = {}
    for call in _chained(calls):
        for first, (sums, entering) in call.parts.items():
            for i, steps in enumerate(sums.cpu()):
                if not steps[:, 0].any():
                    continue  # no gradient was wanted of this layer
                squares = None if entering is None else entering[:, i].cpu()
                rows.setdefault(first + i, []).append((call, steps, squares))
    for row, parts in sorted(rows.items()):
        D = 2 if getattr(calls[0].recorder.module, "bidirectional", False) else 1
        yield row, _record(parts, reverse=row % D == 1)


def _chained(calls: list) -> list:
    """Each call behind the one that it goes on from, sequence by sequence."""
    sequences, ends = [], {}
    for call in calls:
        sequence = ends.pop(id(call.before), None)
        if sequence is None:
            sequences.append(sequence := [])
        sequence.append(call)
        ends[id(call)] = sequence
    return [call for sequence in sequences for call in sequence]


def _handed_back(steps: Tensor, squares: Tensor, at: dict[str, int], H: int) -> Tensor:
    """steps, with what came back to the last of them from the call that went on from there: squares, of the norms of
    the gradients of its h0 and c0. How much of the one of h reaches c is estimated: by the mean of the output gate, and
    as no more than all there is."""
    steps = steps.clone()
    last = steps[-1]
    last[at["dh_arrived"]] = squares[0]
    if "c" in at:
        output = last[at["gate o"]] / (last[at["rows"]] * H).clamp(min=1)
        h, c = squares.sqrt()
        last[at["dc_arrived"]] = torch.minimum((c + output * h).square(), last[at["dc"]])
    return steps


def _record(parts: list, reverse: bool) -> Record:
    first = parts[0][0]
    at, H = ops.watched_columns(first.cell), first.recorder.module.hidden_size
    pieces, starts, cuts = [], [], []
    for i, (call, steps, _) in enumerate(parts):
        after, _, squares = parts[i + 1] if i + 1 < len(parts) else (None, None, None)
        if squares is not None and after.before is call and not reverse:
            steps = _handed_back(steps, squares, at, H)
        begins = torch.zeros(len(steps), dtype=torch.bool)
        begins[0] = i == 0 or call.before is not parts[i - 1][0] or reverse
        pieces.append(steps)
        starts.append(begins)
        cuts.append(steps.new_zeros(len(steps)) if call.cuts is None else call.cuts.cpu())
    sums, cut = torch.cat(pieces), torch.cat(cuts)
    rows = sums[:, at["rows"]]

    def norm(name):
        return sums[:, at[name]].sqrt() if name in at else None

    count = (rows * H).clamp(min=1)
    gates = {
        name.removeprefix("gate "): Gate(*(sums[:, k] / count for k in range(column, column + 3)))
        for name, column in at.items()
        if name.startswith("gate ")
    }
    states = map(norm, ("h", "dh", "dh_arrived", "c", "dc", "dc_arrived"))
    return Record(rows, *states, gates, torch.cat(starts) | (cut > 0) & (cut == rows), cut, reverse)
