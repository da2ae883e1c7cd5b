"""How a workload is measured: its data and its contenders, the interleaved timing, the errors against float64.

Two contenders are compared by calling them in turn in one process, in an order drawn anew every round: what slows the
machine down meanwhile slows both. A figure is the median of its calls, with the quartiles beside it.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.workloads import Workload

SHORT = 50e-6  # seconds: shorter calls are timed several at a time
LONG = 2.0  # seconds: of longer calls a few rounds must do
PAUSE = 0.05  # seconds until the thread pool of the other contender has stopped spinning (see apart())
ERROR_WORK = 2e10  # operations: the float64 truth is taken from as many steps as this pays for
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


# ---------------------------------------------------------------------------------------------------- the work


def recurrent_weights(w: Workload) -> int:
    """Recurrent weights of one layer, all directions: what every step has to read again."""
    width = w.P or w.H
    return w.D * (GATES[w.family] * w.H * width + (w.H * w.P if w.P else 0))


def operations(w: Workload, mode: str, rows: float | None = None) -> float:
    """Multiplications and additions of all products; `rows` is how many rows all steps have, B * T unless ragged."""
    width, gates = w.P or w.H, GATES[w.family]
    rows = w.B * w.T if rows is None else rows
    projection = [2 * w.D * gates * w.H * (w.I if layer == 0 else w.D * width) for layer in range(w.L)]
    forward = sum(projection) + 2 * w.L * recurrent_weights(w)
    if mode == "inference":
        return rows * forward
    return rows * (3 * forward - (0 if w.input_gradient else projection[0]))


class Case:
    """A workload with its data: the same weights, input and incoming gradient for torch.nn and for fastrnn.

    Contenders: "torch", "fastrnn" and, for resets, "plain" (fastrnn on the same input without resets).
    """

    def __init__(self, w: Workload, dtype: torch.dtype, seed: int = 0):
        self.w, self.dtype = w, dtype
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        torch.manual_seed(seed)
        self.cell = w.cell.endswith("Cell")
        base = getattr(nn, w.cell)
        if self.cell:
            theirs, lead = base(w.I, w.H), ()
        else:
            theirs = base(w.I, w.H, w.L, bidirectional=w.D == 2, **({"proj_size": w.P} if w.P else {}))
            lead = (w.L * w.D,)
        theirs = theirs.to(dtype)
        self.modules = {"torch": theirs, "fastrnn": fastrnn.accelerate(copy.deepcopy(theirs))}
        self.x = normal(w.B, w.I) if self.cell else normal(w.T, w.B, w.I)
        self.hx = None
        if w.state:
            h = normal(*lead, w.B, w.P or w.H)
            self.hx = (h, normal(*lead, w.B, w.H)) if w.family == "LSTM" else h
        self.done = torch.rand(w.T, w.B, generator=generator) < w.reset if w.reset else None
        self.rows = float(w.B * w.T)
        self.lengths = self.packed = None
        if w.variant:
            count = 16 if w.variant == "new lengths" else 1
            low = max(1, w.T // 4)
            self.lengths = [torch.randint(low, w.T + 1, (w.B,), generator=generator) for _ in range(count)]
            self.rows = statistics.mean(float(lengths.sum()) for lengths in self.lengths)
            if w.variant == "packed":
                self.packed = pack_padded_sequence(self.x, self.lengths[0], enforce_sorted=False)
                self.x = self.packed.data
        self.turns = {name: itertools.cycle(self.lengths or [None]) for name in ("torch", "fastrnn")}
        with torch.no_grad():
            self.gradient = normal(*self.output("fastrnn", self.modules["fastrnn"], self.x, self.hx).shape)

    def freeze(self) -> None:
        """Adds the contender "frozen": fastrnn with packed weights that are kept, as the peers keep theirs."""
        self.modules["frozen"] = copy.deepcopy(self.modules["fastrnn"]).freeze()

    def contenders(self) -> list[str]:
        return ["torch", "fastrnn", "plain"] if self.done is not None else ["torch", "fastrnn"]

    def output(self, name: str, module: nn.Module, x: torch.Tensor, hx, lengths: torch.Tensor | None = None):
        """The first result of contender `name`, in the way its users have to write the call."""
        if self.cell:
            found = module(x, hx)
            return found[0] if isinstance(found, tuple) else found
        if self.packed is not None:
            return module(PackedSequence(x, *self.packed[1:]))[0].data
        if self.lengths is not None:
            lengths = self.lengths[0] if lengths is None else lengths
            if name == "fastrnn":
                return module(x, lengths=lengths)[0]
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return pad_packed_sequence(module(packed)[0], total_length=self.w.T)[0]
        if self.done is None or name == "plain":
            return module(x, hx)[0]
        return module(x, reset=self.done)[0] if name == "fastrnn" else self.loop(module, x)

    def loop(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """One call of torch.nn for each step, as recurrent PPO does: the only way there to reset a state."""
        zero = x.new_zeros(self.w.L, self.w.B, self.w.H)
        hx = (zero, zero) if self.w.family == "LSTM" else zero
        outputs = []
        for step, done in zip(x, self.done):
            keep = (~done).to(x.dtype)[:, None]
            hx = tuple(keep * s for s in hx) if isinstance(hx, tuple) else keep * hx
            output, hx = module(step[None], hx)
            outputs.append(output)
        return torch.cat(outputs)

    def call(self, name: str, mode: str) -> Callable[[], None]:
        """The call that is timed. Inference: where the caller has turned gradients off, once for many calls. Training:
        forward and backward of a fixed gradient, into empty .grad, as after optimizer.zero_grad()."""
        module = self.modules["fastrnn" if name == "plain" else name]
        x, hx, gradient = self.x, self.hx, self.gradient
        turn = self.turns["torch" if name == "torch" else "fastrnn"]
        if mode == "inference":
            return lambda: self.output(name, module, x, hx, next(turn))
        if self.w.input_gradient:
            x = x.detach().requires_grad_()
        leaves = [*module.parameters(), x]

        def train():
            for leaf in leaves:
                leaf.grad = None
            self.output(name, module, x, hx, next(turn)).backward(gradient)

        return train

    def results(self, name: str, dtype: torch.dtype, gradients: bool) -> dict[str, torch.Tensor]:
        """The output and, if asked for, the gradient of every parameter and of the input."""
        module = copy.deepcopy(self.modules[name]).to(dtype)
        x = self.x.detach().to(dtype, copy=True).requires_grad_(self.w.input_gradient)
        hx = tuple(h.to(dtype) for h in self.hx) if isinstance(self.hx, tuple) else self.hx
        if isinstance(hx, torch.Tensor):
            hx = hx.to(dtype)
        with torch.set_grad_enabled(gradients):
            output = self.output(name, module, x, hx)
        found = {"output": output.detach()}
        if gradients:
            output.backward(self.gradient.to(dtype))
            found |= {name: p.grad for name, p in module.named_parameters()}
            if x.grad is not None:
                found["input"] = x.grad
        return found


# ---------------------------------------------------------------------------------------------------- errors


def error_ratio(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> float:
    """fastrnn's error in norm over torch.nn's; errors of nothing but luck (1e-9 of the truth) count as that."""
    floor = 1e-9 * float(truth.norm()) + 1e-300
    errors = [max(float((x.double() - truth).norm()), floor) for x in (ours, theirs)]
    return errors[0] / errors[1]


def errors(w: Workload, dtype: torch.dtype) -> dict:
    """fastrnn's error against float64 over torch.nn's: of the output, and the worst over all gradients.

    Of long workloads the first steps are taken: torch.nn's float64 is slow.
    """
    gradients = "training" in w.modes
    work = operations(w, "training" if gradients else "inference")
    steps = w.T if work <= ERROR_WORK else max(1, int(w.T * ERROR_WORK / work))
    case = Case(replace(w, T=steps), dtype, seed=1)
    truth = case.results("torch", torch.float64, gradients)
    theirs, ours = (case.results(name, dtype, gradients) for name in ("torch", "fastrnn"))
    ratios = {name: error_ratio(ours[name], theirs[name], truth[name]) for name in truth}
    found = {"steps": steps, "output": ratios.pop("output")}
    if ratios:
        found["worst_gradient"] = max(ratios, key=ratios.get)
        found["gradient"] = ratios[found["worst_gradient"]]
    return found


# ---------------------------------------------------------------------------------------------------- time


def summary(times: list[float], calls: int) -> dict:
    """Seconds of one call: median and quartiles of what was timed, `calls` calls at a time."""
    times = sorted(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    q1, q3 = max(quartiles[0], times[0]), min(quartiles[2], times[-1])
    return {"median": statistics.median(times), "q1": q1, "q3": q3, "rounds": len(times), "calls": calls}


def timed(call: Callable[[], None], calls: int = 1) -> float:
    """Seconds of one of `calls` calls in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def prepare(contenders: dict[str, Callable[[], None]]) -> tuple[dict[str, float], dict[str, int]]:
    """An untimed call of each, then a rough time of each; how many calls of each are timed at once."""
    for call in contenders.values():
        call()
    rough = {name: timed(call) for name, call in contenders.items()}
    rough = {name: min(t, timed(contenders[name])) if t < LONG / 10 else t for name, t in rough.items()}
    return rough, {name: max(1, round(2 * SHORT / t)) if t < SHORT else 1 for name, t in rough.items()}


def interleave(contenders: dict[str, Callable[[], None]], seconds: float, order: random.Random) -> dict[str, dict]:
    """The contenders in turn, `seconds` in all but at least 5 rounds (3 of calls longer than LONG)."""
    rough, calls = prepare(contenders)
    once = sum(rough[name] * calls[name] for name in contenders)
    rounds = max(3 if max(rough.values()) > LONG else 5, min(2000, int(seconds / once)))
    times = {name: [] for name in contenders}
    with no_garbage_collection():
        for _ in range(rounds):
            for name in order.sample(list(contenders), len(contenders)):
                times[name].append(timed(contenders[name], calls[name]))
    return {name: summary(t, calls[name]) for name, t in times.items()}


def apart(contenders: dict[str, Callable[[], None]], seconds: float, order: random.Random) -> dict[str, dict]:
    """The same for contenders with thread pools of their own, which go on spinning after a call and would slow the next
    one's down: a turn is a pause until that is over, untimed calls until the own pool is awake, then timed calls.
    """
    rough, calls = prepare(contenders)
    pause = PAUSE if torch.get_num_threads() > 1 else 0.0
    turn = max(0.02, seconds / 20)
    cost = sum(pause + 0.002 + max(turn, rough[name] * 2) for name in contenders)
    rounds = max(3 if max(rough.values()) > LONG else 5, min(40, int(seconds / cost)))
    times = {name: [] for name in contenders}
    with no_garbage_collection():
        for _ in range(rounds):
            for name in order.sample(list(contenders), len(contenders)):
                time.sleep(pause)
                begin = time.perf_counter()
                contenders[name]()
                while time.perf_counter() - begin < 0.002:
                    contenders[name]()
                begin = time.perf_counter()
                times[name].append(timed(contenders[name], calls[name]))
                while time.perf_counter() - begin < min(turn, seconds / (2 * rounds)):
                    times[name].append(timed(contenders[name], calls[name]))
    return {name: summary(t, calls[name]) for name, t in times.items()}


class no_garbage_collection:
    """As timeit does: a collection belongs to nobody's call."""

    def __enter__(self):
        gc.collect()
        self.enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *exc):
        if self.enabled:
            gc.enable()


def measure(w: Workload, dtype: torch.dtype, seconds: float, peers=(), order: random.Random | None = None) -> dict:
    """One row of the results. `peers` are the classes of peers.py; they know which workloads they can run."""
    order = order or random.Random(w.name)
    case = Case(w, dtype)
    row = {
        "name": w.name, "group": w.group, "cell": w.cell, **{k: getattr(w, k) for k in "BTIHLDP"},
        "variant": w.variant, "reset": w.reset, "state": w.state, "source": w.source, "note": w.note,
        "input_gradient": w.input_gradient, "recurrent_weights": recurrent_weights(w),
    }  # fmt: skip
    for mode in w.modes:
        with torch.set_grad_enabled(mode == "training"):
            times = interleave({name: case.call(name, mode) for name in case.contenders()}, seconds, order)
        work = operations(w, mode, case.rows)
        row[mode] = {
            "times": times,
            "operations": work,
            "us_per_step": {name: t["median"] * 1e6 / (w.T * w.L) for name, t in times.items()},
            "gflops": {name: work / t["median"] * 1e-9 for name, t in times.items()},
            "ratio": times["torch"]["median"] / times["fastrnn"]["median"],
        }
        if "plain" in times:
            row[mode]["over_plain"] = times["fastrnn"]["median"] / times["plain"]["median"]
    row["error"] = errors(w, dtype)
    for peer in peers:
        if "inference" in w.modes and peer.serves(w, dtype):
            row["inference"].setdefault("peers", {})[peer.name] = beside(peer, case, seconds, order)
    return row


def beside(peer, case: Case, seconds: float, order: random.Random) -> dict:
    """One peer, fastrnn frozen (so that both keep their weights packed) and fastrnn as it is; a peer whose numbers are
    not torch.nn's is not timed."""
    try:
        contender = peer(case)
        wrong = contender.difference()
    except Exception as error:  # whatever the peer's library raises: it is reported, and the others go on
        return {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    if not wrong <= contender.tolerance:
        most = f"at most {contender.tolerance:g} expected"
        return {"left_out": f"its output differs from torch.nn's by {wrong:.1e}, {most}"}
    case.freeze()
    ours = {name: case.call(name, "inference") for name in ("frozen", "fastrnn")}
    with torch.no_grad():
        times = apart({peer.name: contender.run, **ours}, seconds, order)
    steps = case.w.T * case.w.L
    return {
        "times": times,
        "us_per_step": times[peer.name]["median"] * 1e6 / steps,
        "ratio": times[peer.name]["median"] / times["frozen"]["median"],
        "ratio_not_frozen": times[peer.name]["median"] / times["fastrnn"]["median"],
        "difference": wrong,
    }
