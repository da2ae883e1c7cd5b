"""What benchmarks/card.py runs in children of its own: checks and times fastrnn's paths on a GPU beside cuDNN.

    python benchmarks/card_time.py smoke REQUEST             is each path right?
    python benchmarks/card_time.py small PATH                a few small layers, for compute-sanitizer
    python benchmarks/card_time.py bench|rl|packed REQUEST   times
    python benchmarks/card_time.py flashrnn REQUEST          FlashRNN, where it is installed

REQUEST is a JSON file: {"items": [...], "seconds": of timing for an item, "right": what smoke found}. Results go to a
journal (card_watch.py).

Times are CUDA events around one or several calls, contenders in an order drawn anew each round, so that what slows the
card down slows all; medians with quartiles. Neither clocks nor caches are touched: weights that fit into the L2 cache
stay there from call to call, for every contender.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import random
import statistics
import sys
import traceback
from pathlib import Path

import torch
from card_watch import LOST, STICKY, Journal
from card_work import CUDNN, PATHS, Work, of_item
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import _C

DTYPES = {"tf32": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}  # fmt: skip
# What an error may be beside cuDNN's: architecture.md, section 5, twice over: tests judge, this only keeps what is
# wrong out of the tables.
TINY = {"float32": 2e-7, "tf32": 3e-3, "bfloat16": 3e-3, "float16": 3e-3, "float64": 1e-13}
TRUTH_STEPS = 48  # of long sequences the first steps are checked
WITHOUT_RESETS = "cuDNN without resets"


# --------------------------------------------------------------------------------------------------------- the switch


@contextlib.contextmanager
def forced(path: str):
    _C.set_gpu_path(path)
    try:
        yield
    finally:
        _C.set_gpu_path("")


@contextlib.contextmanager
def asked_for(precision: str):
    switch = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def served(module, *args, **options) -> tuple[str, str]:
    """The path that a forced call takes going forward, and the plan in words."""
    plan = fastrnn.explain(module, *args, **options)
    paths = {text.replace(",", " ").split()[0] for text in plan.splits} & set(PATHS)
    return (paths.pop() if len(paths) == 1 else "several" if paths else "", str(plan))


# ------------------------------------------------------------------------------------------------------ the contenders


def split_and_pad(module: nn.Module, x: torch.Tensor, reset: torch.Tensor) -> torch.Tensor:
    """What recurrent reinforcement learning does on cuDNN: episodes become rows of their own, padded to the longest."""
    T, B = reset.shape
    starts = reset.clone()
    starts[0] = True
    flat = starts.t().reshape(-1)
    index = flat.nonzero().squeeze(1)
    segment = flat.cumsum(0) - 1
    position = torch.arange(T * B, device=x.device) - index[segment]
    padded = x.new_zeros(int(position.max()) + 1, index.numel(), x.size(2))
    padded[position, segment] = x.transpose(0, 1).reshape(T * B, -1)
    return module(padded)[0][position, segment].view(B, T, -1).transpose(0, 1)


class Case:
    """A workload on the card: cuDNN's module and fastrnn's with the same weights, input and incoming gradient."""

    def __init__(self, w: Work, precision: str, steps: int | None = None, seed: int = 0, device: str = "cuda"):
        self.w, self.dtype, self.T = w, DTYPES[precision], steps or w.T
        g, there = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed)
        theirs = getattr(nn, w.cell)(w.I, w.H, w.L, bidirectional=w.D == 2).to(self.dtype)
        self.ours = fastrnn.accelerate(copy.deepcopy(theirs)).to(device)
        self.theirs = theirs.to(device)
        self.x = torch.randn(self.T, w.B, w.I, generator=there, device=device).to(self.dtype)
        self.gradient = torch.randn(self.T, w.B, w.D * w.H, generator=there, device=device).to(self.dtype)
        self.reset = self.lengths = self.packed = None
        if w.reset:
            self.reset = (torch.rand(self.T, w.B, generator=g) < w.reset).to(device)
        if w.variant:
            self.lengths = torch.randint(max(1, self.T // 4), self.T + 1, (w.B,), generator=g)
            self.lengths[0] = self.T
            self.on_card = self.lengths.to(device)
            self.packed = pack_padded_sequence(self.x, self.lengths, enforce_sorted=False)
            if w.variant == "packed":
                self.gradient = pack_padded_sequence(self.gradient, self.lengths, enforce_sorted=False).data

    def output(self, name: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The output of a contender, called as its users have to."""
        if self.w.variant == "packed":
            return module(self.packed._replace(data=x))[0].data
        if self.w.variant == "lengths":
            if name not in (CUDNN, "truth"):
                return module(x, lengths=self.on_card)[0]
            packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
            return pad_packed_sequence(module(packed)[0], total_length=self.T)[0]
        if self.reset is None or name == WITHOUT_RESETS:
            return module(x)[0]
        if name in (CUDNN, "truth"):
            return split_and_pad(module, x, self.reset)
        return module(x, reset=self.reset)[0]

    def input(self) -> torch.Tensor:
        return self.packed.data if self.w.variant == "packed" else self.x

    def module(self, name: str) -> nn.Module:
        return self.theirs if name in (CUDNN, WITHOUT_RESETS) else self.ours

    def call(self, name: str, mode: str):
        """What is timed. Training: forward, and backward of a fixed gradient into empty .grad."""
        module, x, gradient = self.module(name), self.input().detach(), self.gradient
        path = name if name in PATHS else ""
        if mode == "forward":

            def call():
                with forced(path):
                    self.output(name, module, x)

            return call
        x = x.clone().requires_grad_()
        leaves = [x, *module.parameters()]

        def train():
            for leaf in leaves:
                leaf.grad = None
            with forced(path):
                self.output(name, module, x).backward(gradient)

        return train

    def results(self, name: str, gradients: bool) -> dict[str, torch.Tensor]:
        exact = name == "truth"
        module = copy.deepcopy(self.theirs).double() if exact else self.module(name)
        work = torch.float64 if exact else self.dtype
        x = self.input().detach().to(work).clone().requires_grad_()
        with torch.set_grad_enabled(gradients), forced(name if name in PATHS else ""):
            output = self.output(name, module, x)
            found = {"output": output}
            if gradients:
                grads = torch.autograd.grad(output, [x, *module.parameters()], self.gradient.to(work))
                found |= dict(zip(["input", *(n for n, _ in module.named_parameters())], grads, strict=True))
        return {k: v.detach() for k, v in found.items()}

    def served(self, path: str) -> tuple[str, str]:
        with forced(path):
            if self.w.variant == "packed":
                return served(self.ours, self.packed)
            if self.w.variant == "lengths":
                return served(self.ours, self.x, lengths=self.on_card)
            return served(self.ours, self.x, **({} if self.reset is None else {"reset": self.reset}))

    def back(self, path: str) -> str:
        """The path of back-propagation, which has other needs: of the first layer."""
        w = self.w
        cell, dtype = {"RNN": "rnn_tanh"}.get(w.cell, w.cell.lower()), str(self.dtype)[6:]
        tf32 = dtype == "float32" and torch.backends.cudnn.rnn.fp32_precision == "tf32"
        with forced(path):
            return _C.gpu_plan(cell, dtype, tf32, True, self.T, w.B, w.I, w.H, w.H, w.D)["path"]


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, in norm; infinite for NaN, and for anything but zeros where the truth is zero."""
    difference, size = (found.double() - truth).norm().item(), truth.norm().item()
    if difference != difference:
        return float("inf")
    return difference / size if size else float("inf") if difference else 0.0


def errors(w: Work, precision: str, names: list[str], gradients: bool, steps: int = TRUTH_STEPS, device: str = "cuda"):
    """name -> {"worst": largest of the errors over what they may be, "output": error, "cuDNN": cuDNN's, ...}."""
    case = Case(w, precision, min(w.T, steps), seed=1, device=device)
    truth = case.results("truth", gradients)
    theirs = {k: distance(v, truth[k]) for k, v in case.results(CUDNN, gradients).items()}
    found = {}
    for name in names:
        mine = {k: distance(v, truth[k]) for k, v in case.results(name, gradients).items()}
        shares = {k: e / (3 * theirs[k] + 2 * TINY[precision]) for k, e in mine.items()}
        worst = max(shares, key=shares.get)
        found[name] = {"worst": shares[worst], "of": worst, "error": mine[worst], "cuDNN": theirs[worst],
                       "output": mine["output"]}  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------------------------- time


def timed(call, calls: int) -> float:
    """Seconds of one of `calls` calls in a row, by the card's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def summary(times: list[float], calls: int) -> dict:
    times = sorted(times)
    q1, _, q3 = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": statistics.median(times), "q1": max(q1, times[0]), "q3": min(q3, times[-1]), "least": times[0],
            "rounds": len(times), "calls": calls}  # fmt: skip


def interleave(contenders: dict, seconds: float, order: random.Random, clock=timed) -> dict[str, dict]:
    """Medians over rounds of all contenders, each in a new order: `seconds` in all, but at least seven rounds."""
    for call in contenders.values():
        for _ in range(3):
            call()
    rough = {name: min(clock(call, 1), clock(call, 1)) for name, call in contenders.items()}
    calls = {name: max(1, min(50, round(2e-3 / max(t, 1e-6)))) for name, t in rough.items()}
    once = sum(rough[name] * calls[name] for name in contenders)
    rounds = max(7, min(60, int(seconds / once)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            times[name].append(clock(contenders[name], calls[name]))
    return {name: summary(t, calls[name]) for name, t in times.items()}


def measure(item: str, seconds: float, right: dict, clock=timed, device: str = "cuda") -> dict:
    """A row of the results: cuDNN beside every path that serves the workload and is right."""
    w, precision, mode = of_item(item)
    row = {"name": w.name, "group": w.group, "cell": w.cell, "precision": precision, "mode": mode, "variant": w.variant,
           "reset": w.reset, **{letter: getattr(w, letter) for letter in "BTIHLD"}}  # fmt: skip
    with asked_for(precision):
        case, paths, left_out, plans = Case(w, precision, device=device), [], {}, {}
        for path in PATHS:
            if not right.get(path, {}).get(f"{w.cell} {precision}", False):
                left_out[path] = "smoke did not find it right"
                continue
            by, plan = case.served(path)
            if by != path:
                left_out[path] = f"does not serve this: {plan}"
            else:
                paths.append(path)
                plans[path] = f"{plan}\n  backward: {case.back(path)}" if mode == "training" else plan
        row["error"] = errors(w, precision, paths, mode == "training", device=device) if paths else {}
        for path in [p for p in paths if not row["error"][p]["worst"] <= 1]:
            left_out[path] = f"wrong: {row['error'][path]}"
            paths.remove(path)
        names = [CUDNN, *([WITHOUT_RESETS] if w.reset else []), *paths]
        with torch.set_grad_enabled(mode == "training"):
            times = interleave({n: case.call(n, mode) for n in names}, seconds, random.Random(item), clock)
    row |= {"times": times, "left_out": left_out, "plans": {p: plans[p] for p in paths}}
    row["us"] = {name: t["median"] * 1e6 / (w.T * w.L) for name, t in times.items()}
    best = min(paths, key=lambda p: times[p]["median"], default=None)
    row |= {"best": best, "ratio": times[CUDNN]["median"] / times[best]["median"] if best else None}
    return row


# -------------------------------------------------------------------------------------------------------------- smoke

SMOKE = [(1, 1, 3, 8), (5, 2, 9, 18), (20, 16, 40, 64), (7, 3, 33, 100), (9, 24, 64, 256)]  # T, B, I, H


def smoke(item: str, device: str = "cuda") -> dict:
    """Forward and backward of a few shapes against float64. right: all of them are; served: by how many calls."""
    path, cell, precision = item.replace(" | ", " ").split(" ")
    shapes, right, count = {}, True, 0
    with asked_for(precision):
        for T, B, I, H in SMOKE:
            w = Work(f"{cell} smoke", "smoke", cell, B, T, I, H)
            found = errors(w, precision, [path], True, device=device)[path]
            by, _ = Case(w, precision, device=device).served(path)
            shapes[f"{T},{B},{I},{H}"] = found | {"served": by}
            right &= found["worst"] <= 1
            count += by == path
    return {"right": bool(right and count), "served": count, "shapes": shapes}


def small(path: str) -> int:
    """Every cell and dtype once forward and back, with resets and lengths, against float64 on the CPU: small enough for
    compute-sanitizer, and without cuDNN."""
    wrong, count = 0, 0
    for cell in ("LSTM", "GRU", "RNN"):
        for precision in ("float32", "tf32", "bfloat16"):
            dtype = DTYPES[precision]
            torch.manual_seed(0)
            module = getattr(nn, cell)(7, 40, dtype=dtype)
            x, gradient = torch.randn(5, 9, 7, dtype=dtype), torch.randn(5, 9, 40, dtype=dtype)
            options = {"reset": torch.rand(5, 9) < 0.3, "lengths": torch.randint(0, 6, (9,))}
            results = []
            for where, work in (("cpu", torch.float64), ("cuda", dtype)):
                ours = fastrnn.accelerate(copy.deepcopy(module)).to(where, work)
                given = x.to(where, work).requires_grad_()
                on = {k: v.to(where) for k, v in options.items()}
                with forced(path), asked_for(precision):
                    by = served(ours, given, **on)[0]
                    output = ours(given, **on)[0]
                    grads = torch.autograd.grad(output, [given, *ours.parameters()], gradient.to(where, work))
                results.append([t.detach().cpu().double() for t in (output, *grads)])
            worst = max(distance(b, a) for a, b in zip(*results))
            good = worst <= {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 5e-2}[precision]
            print(f"{cell} {precision}, by {by}: {worst:.1e}{'' if good else ' WRONG'}", flush=True)
            wrong += not good
            count += by == path
    return 1 if wrong or not count else 0


# ----------------------------------------------------------------------------------------------------------- flashrnn


def flash(item: str, seconds: float) -> dict:
    """FlashRNN's fused kernels on the recurrence alone: it leaves the product with the input to its user."""
    name, mode = item.split(" | ")
    cell, *sizes = name.split(" ")
    B, T, H = (int(size[1:]) for size in sizes)
    gates, states = 4, 2
    flashrnn = importlib.import_module("flashrnn").flashrnn
    options = dict(device="cuda", dtype=torch.bfloat16, requires_grad=mode == "training")
    x = torch.randn(B, T, gates, 1, H, **options)
    R = (torch.randn(gates, 1, H, H, device="cuda") / H**0.5).bfloat16().requires_grad_(mode == "training")
    b = torch.zeros(gates, 1, H, **options)
    start = torch.zeros(states, B, 1, 1, H, device="cuda", dtype=torch.bfloat16)

    def call():
        found, _ = flashrnn(x, R, b, states=start, function=cell.lower(), backend="cuda_fused")
        if mode == "training":
            found[0].float().sum().backward()

    with torch.set_grad_enabled(mode == "training"):
        times = interleave({"FlashRNN": call}, seconds, random.Random(0))
    return {"times": times, "us": {"FlashRNN": times["FlashRNN"]["median"] * 1e6 / T}, "mode": mode, "name": name}


# ----------------------------------------------------------------------------------------------------------- the child


def work_off(items: list[str], function) -> int:
    """Each item's result, or what went wrong, into the journal. Ends early when the context is gone."""
    journal = Journal()
    for item in items:
        journal.begin(item)
        try:
            result = function(item)
        except Exception as error:  # whatever a library raises: it is this item's result
            text = f"{type(error).__name__}: {error}"
            journal.end(item, {"failed": text[:1500], "trace": traceback.format_exc()[-1500:]})
            if STICKY.search(text):
                return LOST
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
        else:
            journal.end(item, result)
    return 0


def main(arguments: list[str]) -> int:
    what = arguments[0]
    if what == "small":
        return small(arguments[1])
    request = json.loads(Path(arguments[1]).read_text())
    seconds = request.get("seconds", 1.0)
    functions = {"smoke": smoke, "flashrnn": lambda item: flash(item, seconds)}
    function = functions.get(what, lambda item: measure(item, seconds, request["right"]))
    return work_off(request["items"], function)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
