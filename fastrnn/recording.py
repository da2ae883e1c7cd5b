"""What watched layers write down while they are trained; probe.py opens a recording and reads it.

A Recording is of one model. Each of its modules that is watched has a Recorder. A forward pass that will be
differentiated begins a Call there, and the backward pass hands it, layer by layer, the sums that the kernels make of
every step (`ops.layer_backward`'s watch). Where no kernel of ours computes a call, reference.py loops over its steps,
and Steps makes the same sums of them by hooks.

One training step is what happens up to the end of a backward pass: the first forward call after one begins the next.
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor, nn

from fastrnn import ops

# Above (below) these a gate counts as high (low): 0.1 and 0.9 of a sigmoid are those of Karpathy, Johnson and Fei-Fei
# 2015, "Visualizing and Understanding Recurrent Networks". By csrc/problem.h.
_LOW, _HIGH = {"sigmoid": 0.1, "tanh": -0.9, "relu": 0.0}, {"sigmoid": 0.9, "tanh": 0.9, "relu": None}
_SQUASH = {"i": "sigmoid", "f": "sigmoid", "g": "tanh", "o": "sigmoid", "r": "sigmoid", "z": "sigmoid", "n": "tanh"}
_MOST_BYTES = 256 << 20
_CALL_BYTES = 2000  # about what a call takes beside its sums
_FAR = 16  # nodes of autograd's graph that a state may have gone through on its way to the next call
_INFINITY = float("inf")
_queue = torch.autograd.Variable._execution_engine.queue_callback

_recorders: dict[int, Recorder] = {}  # by id of the module, which its recording keeps alive
_lock = threading.Lock()


def recorder_of(module: nn.Module) -> Recorder | None:
    """Who watches a module. Nobody while a graph is captured: it would have to hold the recorder."""
    if torch.compiler.is_compiling() or not _recorders:
        return None
    return _recorders.get(id(module))


def slow(x: Tensor) -> bool:
    """Whether a watched call goes through the reference's loop, since no kernel of this device makes the sums yet."""
    return not x.is_cpu and not x.is_meta and torch._C._get_tracing_state() is None


def cuts(reset: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> Tensor:
    """How many rows `reset` (T, B) cuts before each step (T,), of those that run then."""
    T, B = reset.shape
    if batch_sizes is not None:
        reset = reset & (torch.arange(B) < batch_sizes[:, None]).to(reset.device)
    elif lengths is not None:
        reset = reset & (torch.arange(T, device=reset.device)[:, None] < lengths.to(reset.device))
    return reset.sum(1, dtype=torch.float64)


class _EagerMeanwhile:
    """Has what torch.compile made run eagerly while any recording is open: graphs that were captured without a recorder
    know of none. Without Dynamo there are none."""

    stance = None

    @classmethod
    def begin(cls) -> None:
        if cls.stance is None and "torch._dynamo" in sys.modules:
            cls.stance = torch.compiler.set_stance("force_eager")
            cls.stance.__enter__()

    @classmethod
    def end(cls) -> None:
        if cls.stance is not None:
            cls.stance.__exit__(None, None, None)
            cls.stance = None


class Recording:
    """What the modules of a model have written down, training step by training step."""

    def __init__(self, modules: dict[str, nn.Module], history: int):
        self.recorders = [Recorder(self, name, module) for name, module in modules.items()]
        found: dict[Tensor, str] = {}  # a tied one by its first name
        for recorder in self.recorders:
            for name, p in recorder.module.named_parameters(prefix=recorder.name):
                found.setdefault(p, name)
        self._parameters, self._names = list(found), list(found.values())
        self.steps: list[TrainingStep] = []  # finished ones, evenly spread over the training, and the last
        self.trained = 0  # how many there were
        self._most, self._every, self._current = history, 1, None
        self.bytes = 0  # of these steps

    def open(self) -> None:
        with _lock:
            for recorder in self.recorders:
                if id(recorder.module) in _recorders:
                    name = recorder.name or type(recorder.module).__name__
                    raise RuntimeError(f"model: expected modules that no other open probe watches, got {name!r}")
            _recorders.update((id(recorder.module), recorder) for recorder in self.recorders)
            _EagerMeanwhile.begin()

    def close(self) -> None:
        with _lock:
            for recorder in self.recorders:
                _recorders.pop(id(recorder.module), None)
            if not _recorders:
                _EagerMeanwhile.end()

    def current(self) -> TrainingStep:
        """The training step that a forward call belongs to. Those in the middle of one backward pass (checkpointing
        runs them again there, each with a backward pass of its own) belong together."""
        step, inside = self._current, torch._C._current_graph_task_id()
        # Outside of any: what a pass that broke off has left is no part of the next.
        over = step is None or (step.finished or step.task is not None if inside < 0 else step.finished)
        if over and (step is None or inside < 0 or step.inside != inside):
            step = self._current = TrainingStep()
        if inside >= 0:
            step.inside = inside
        return step

    def received(self, step: TrainingStep) -> None:
        """A part of a training step has been written down: its end is the end of this backward pass."""
        task = torch._C._current_graph_task_id()
        if step.task == task:
            return
        step.task = task
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # After what others queue meanwhile: DistributedDataParallel waits for the gradients of its peers there.
            _queue(lambda: _queue(lambda: self._finish(step)))
        else:
            _queue(lambda: self._finish(step))

    def _finish(self, step: TrainingStep) -> None:
        step.weights = self._norms()
        if step.finished:  # of a step with several backward passes, what the last one left
            return
        step.finished, step.number, step.bytes = True, self.trained, step.size()
        if self.steps and self.steps[-1].number % self._every:
            self.bytes -= self.steps.pop().bytes  # it was kept for being the last
        self.steps.append(step)
        self.bytes += step.bytes
        self.trained += 1
        while len(self.steps) > 2 and (len(self.steps) > self._most or self.bytes > _MOST_BYTES):
            self._every *= 2
            self.steps = [s for s in self.steps[:-1] if s.number % self._every == 0] + self.steps[-1:]
            self.bytes = sum(s.bytes for s in self.steps)

    def _norms(self) -> dict[str, Tensor | float]:
        """Of the gradients that the parameters hold now."""
        names, parameters = self._names, self._parameters
        grads = [p.grad for p in parameters]
        if any(type(g) is not Tensor for g in grads):
            # Of a gradient that is spread over processes (a DTensor) the part that is here.
            grads = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
            kept = [i for i, g in enumerate(grads) if g is not None and g.layout is torch.strided]
            names, grads = [names[i] for i in kept], [grads[i] for i in kept]
        if not grads:
            return {}
        norms = list(torch._foreach_norm(grads))
        for i, norm in enumerate(norms):
            if not norm.is_cpu:  # nobody waits for a GPU here
                continue
            value = norm.item()
            if not 0 < value < _INFINITY:  # perhaps its square has left the range of float32
                value = torch.linalg.vector_norm(grads[i], dtype=torch.float64).item()
            norms[i] = value
        return dict(zip(names, norms))


class TrainingStep:
    """number: from 0, once it is finished. calls: those of all modules that a backward pass has reached, in its order.
    begun: how many there were. weights: the norms of the parameters' gradients. task, inside: the backward pass that
    wrote last, and that in whose middle it had a forward call."""

    def __init__(self):
        self.number, self.calls, self.begun, self.finished = -1, [], 0, False
        self.task = self.inside = None
        self.bytes = 0  # once it is finished
        self.weights: dict[str, Tensor | float] = {}

    def size(self) -> int:
        """Bytes, with those of the objects of a call."""
        return sum(sums.nbytes + _CALL_BYTES for call in self.calls for sums, _ in call.parts.values())


class Recorder:
    """Of one module."""

    def __init__(self, recording: Recording, name: str, module: nn.Module):
        self.recording, self.name, self.module = recording, name, module
        self.latest: Call | None = None
        self.begun = self.reached = False  # whether it had a call, and whether a backward pass came to one

    def begin(self, cell: str, T: int, h0: Tensor | None, cuts: Tensor | None = None) -> Call:
        step = self.recording.current()
        step.begun += 1
        self.begun = True
        before = None if h0 is None or h0.grad_fn is None else self._origin(h0)
        call = Call(self, step, cell, T, before, cuts)
        self.latest = call
        return call

    def _origin(self, state: Tensor) -> Call | None:
        """The call that a state was handed on by, if it was one of this module: through views, masks, casts on the way,
        along the first path of its graph."""
        if slow(state):  # torch's operations, which do not say what call they are of
            return self.latest
        node = state.grad_fn
        for _ in range(_FAR):
            watcher = getattr(node, "watcher", None)
            if isinstance(watcher, Watcher):
                return watcher.call if watcher.call.recorder is self else None
            node = next((before for before, _ in node.next_functions if before is not None), None)
            if node is None:
                break
        return None


class Call:
    """A forward call that will be differentiated. parts: by the first of the layers x directions they are of, the
    sums (layers x directions, T, ops.watched_width) and, if there are gradients of the states that the call was
    given, the squares (2, layers x directions) of their norms. before: the call that it goes on from, if any. cuts:
    `cuts`, if there are any."""

    def __init__(self, recorder: Recorder, step: TrainingStep, cell: str, T: int, before: Call | None, cuts):
        self.recorder, self.step, self.cell, self.T = recorder, step, cell, T
        self.before, self.cuts = before, cuts
        self.number = step.begun
        self.parts: dict[int, tuple[Tensor, Tensor | None]] = {}

    def watcher(self, first: int = 0) -> Watcher:
        return Watcher(self, first)


class Watcher:
    """Of some layers of a call: what autograd.py tells what its backward pass found."""

    def __init__(self, call: Call, first: int):
        self.call, self.first = call, first

    def receive(self, sums: Tensor, d_h0: Tensor | None, d_c0: Tensor | None) -> None:
        entering = None
        if d_h0 is not None or d_c0 is not None:
            entering = sums.new_zeros(2, len(sums))
            for found, d in zip(entering, (d_h0, d_c0)):
                if d is not None:
                    found.copy_(torch.linalg.vector_norm(d.reshape(len(sums), -1), dim=1, dtype=torch.float64).square())
        self.write(sums, entering)

    def write(self, sums: Tensor, entering: Tensor | None) -> None:
        if not self.call.parts:  # a call without a backward pass, as those of an evaluation, is not kept
            self.call.step.calls.append(self.call)
            self.call.recorder.reached = True
        self.call.parts[self.first] = sums, entering
        self.call.recorder.recording.received(self.call.step)

    def steps(self, D: int, T: int, device: torch.device) -> Steps:
        return Steps(self, D, T, device)


class Steps:
    """The sums of one layer whose steps are torch's operations: what `reference.layer` takes as its watch."""

    def __init__(self, watcher: Watcher, D: int, T: int, device: torch.device):
        self.watcher = watcher
        width = ops.watched_width(watcher.call.cell)
        self.sums = torch.zeros(D, T, width, dtype=torch.float64, device=device)
        self.entering = torch.zeros(2, D, dtype=torch.float64, device=device)

    def __call__(self, d: int, T: int) -> Direction:
        return Direction(self, d, T)

    def write(self, to: Tensor, gradient: Tensor) -> None:
        to.copy_(gradient.square().sum())
        self.watcher.write(self.sums, self.entering)


class Direction:
    """One direction of a layer, told of its states step by step."""

    def __init__(self, steps: Steps, d: int, T: int):
        self.steps, self.sums, self.d, self.T = steps, steps.sums[d], d, T
        self.columns = ops.watched_columns(steps.watcher.call.cell)
        self.valid = self.into_c = None  # of the step before: its rows; what a gradient of h is worth for c

    def enters(self, t: int, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The states that step t starts from; returns others in their place, whose gradients are of that use alone."""
        before = t + 1 if self.d else t - 1
        arrived: dict[str, Tensor] = {}
        states = {"h": h.view_as(h)} if c is None else {"h": h.view_as(h), "c": c.view_as(c)}
        inside, valid, into_c = 0 <= before < self.T, self.valid, self.into_c

        def hook(name: str, gradient: Tensor) -> None:
            gradient = gradient.detach().double()
            if inside and valid is not None:
                gradient = torch.where(valid, gradient, 0)  # the others' are of what they begin with
            arrived[name] = gradient
            if inside and name == "h":
                self.steps.write(self.sums[before, self.columns["dh_arrived"]], gradient)
            if not inside:
                self.steps.write(self.steps.entering["hc".index(name), self.d], gradient)
            elif len(arrived) == 2:
                through = arrived["h"] * into_c if into_c is not None else 0
                self.steps.write(self.sums[before, self.columns["dc_arrived"]], arrived["c"] + through)

        for name, state in states.items():
            if state.requires_grad:
                state.register_hook(lambda gradient, name=name: hook(name, gradient))
        return states["h"], states.get("c")

    def leaves(self, t: int, h: Tensor, c: Tensor | None, gates: tuple[Tensor, ...], valid: Tensor | None) -> None:
        """The states and gates of step t; valid (B, 1): of which rows."""
        to, cell = self.sums[t], self.steps.watcher.call.cell
        self.valid = valid
        if c is not None and c.shape == h.shape:  # else a projection mixes the units
            self.into_c = (gates[3] * (1 - torch.tanh(c).square())).detach().double()
        for name, state in (("h", h), ("c", c)):
            if state is None:
                continue
            if state.requires_grad:
                column = to[self.columns[f"d{name}"]]
                state.register_hook(
                    lambda gradient, column=column: self.steps.write(column, gradient.detach().double())
                )
            to[self.columns[name]] = _sum(state.detach().double().square(), valid)
        to[self.columns["rows"]] = h.size(0) if valid is None else valid.sum()
        for name, gate in zip(ops.CELLS[cell]["watched"], gates):
            squash, x = _SQUASH.get(name, cell.removeprefix("rnn_")), gate.detach()
            at = self.columns[f"gate {name}"]
            to[at] = _sum(x.double(), valid)
            to[at + 1] = _sum(x <= _LOW[squash], valid)
            if _HIGH[squash] is not None:
                to[at + 2] = _sum(x >= _HIGH[squash], valid)


def _sum(x: Tensor, valid: Tensor | None) -> Tensor:
    return x.sum() if valid is None else torch.where(valid, x, 0).sum()
