"""`python -m fastrnn check`: does fastrnn give torch.nn's numbers on this machine? About a minute, one verdict.

Random cases of every cell, dtype and instruction set: values and all gradients. The truth is computed in float64, by
torch.nn or, where torch.nn has nothing to offer (`reset`, `all_states`, lengths of zero) or is itself float64, by the
plain equations step by step and row by row (`plain_loop`). The rule, per tensor, is on the error against that truth:

    relative error in norm  <=  1.5 * (that of torch in the same dtype) + TINY[dtype]
    error of the largest element, relative to the largest element: three times that

and over all float32 tensors the geometric mean of the ratio of the two errors is at most 1.15. The tensors of a case
with fewer than 32 elements are judged together, as one: on a few numbers torch's own error is good or bad by luck.
A case with a tensor over its limit is drawn again, same sizes, fresh data, four times in all or until its smallest
tensor has given 32 numbers, and judged by all draws of a tensor taken as one: a lucky rounding on torch's side does not
repeat; a fault of a kernel does, and a gross one outweighs the others.
"""

from __future__ import annotations

import argparse
import math
import random
import time
import warnings

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import _C
from fastrnn.terminal import Progress, print_table

KINDS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TINY = {torch.float32: 2e-7, torch.float64: 1e-15, torch.bfloat16: 3e-3, torch.float16: 3e-3}
MEAN_LIMIT = 1.15
SMALL = 32  # elements: see above
# name in the table -> how many cases of each kind and dtype
GROUPS = {
    "layers, directions, layouts": 8,
    "packed sequences": 4,
    "lengths": 2,
    "reset": 2,
    "lengths, reset, all states": 4,
    "cells": 4,
    "double backward": 2,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random cases (default: 0)")
    parser.add_argument("--quick", action="store_true", help="float32 and the instruction set in use only")


# ---------------------------------------------------------------------------------------------------- cases


class Case:
    """One random configuration with its data (input, states, weights, incoming gradients), all exact in `dtype`."""

    def __init__(self, group: str, kind: str, dtype: torch.dtype, seed: int, again: int = 0):
        """`again` draws other data for the same configuration."""
        self.arguments = (group, kind, dtype, seed)
        draw = random.Random(f"{group} {kind} {dtype} {seed}")
        self.group, self.kind, self.dtype = group, kind, dtype
        # plain_loop is slow: small sizes where it is needed.
        looped = group not in ("layers, directions, layouts", "packed sequences", "cells")
        self.cell = group == "cells"
        self.T = 1 if self.cell else draw.randint(1, 7 if looped or dtype == torch.float64 else 20)
        self.B = draw.randint(2, 4 if looped or dtype == torch.float64 else 13)
        self.I, self.H = draw.choice((1, 3, 8, 17, 40)), draw.choice((5, 7, 16, 33, 48, 65))
        self.L = 1 if self.cell else draw.randint(1, 2 if looped else 3)
        self.D = 1 if self.cell else draw.randint(1, 2)
        self.P = draw.randint(3, self.H - 1) if kind == "lstm" and not self.cell and draw.random() < 0.4 else 0
        self.bias, self.batch_first, self.with_hx = (
            kind == "rnn_relu" or draw.random() < 0.7,
            draw.random() < 0.4,
            draw.random() < 0.8,
        )
        self.packed = group == "packed sequences"
        self.unbatched = group == "layers, directions, layouts" and draw.random() < 0.2
        self.all_states = group == "lengths, reset, all states"
        if self.unbatched:
            self.B = 1
        self.lengths = self.reset = None
        if self.packed or "lengths" in group:
            self.lengths = torch.tensor([draw.randint(1 if self.packed else 0, self.T) for _ in range(self.B)])
        generator = torch.Generator().manual_seed(draw.getrandbits(32) + again)
        if "reset" in group:
            self.reset = torch.rand(self.T, self.B, generator=generator) < 0.3

        def random_tensor(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        width = self.P or self.H
        self.x = random_tensor(self.T, self.B, self.I)
        self.hx = [random_tensor(self.L * self.D, self.B, width)] if self.with_hx else []
        if self.with_hx and kind == "lstm":
            self.hx.append(random_tensor(self.L * self.D, self.B, self.H))
        self.state = {}
        for name, p in self.module(nn, "meta").state_dict().items():  # torch.nn's distribution
            uniform = 2 * torch.rand(p.shape, generator=generator, dtype=torch.float64) - 1
            self.state[name] = (uniform * self.H**-0.5).to(dtype)
        if kind == "rnn_relu" and dtype.itemsize == 2:
            # Two correct roundings on either side of relu's corner have the derivatives 0 and 1, and say nothing about
            # accuracy. With 16 bits that happens, so there every unit's sign is decided by its bias, which the products
            # are too small to outweigh.
            for name, w in self.state.items():
                w.copy_(
                    (w.sign() if "ih" in name else w / 2) if "bias" in name else w * (0.1 * self.H**0.5 / w.shape[1])
                )
        states = {"h": width} | ({"c": self.H} if kind == "lstm" else {})
        self.gradients = {"output": random_tensor(self.T, self.B, self.D * width)}
        for name, size in states.items():
            if not (self.cell and name == "h"):
                self.gradients[f"{name}_n"] = random_tensor(self.L * self.D, self.B, size)
            if self.all_states:
                self.gradients[f"{name}_all"] = random_tensor(self.L * self.D, self.T, self.B, size)

    def __str__(self) -> str:
        options = [name for name in ("bias", "batch_first", "with_hx", "unbatched") if getattr(self, name)]
        sizes = " ".join(f"{name}={getattr(self, name)}" for name in "TBIHLDP")
        return f"{self.group}: {self.kind} {str(self.dtype)[6:]} {sizes} {' '.join(options)}"

    def module(self, package, device: str = "cpu") -> nn.Module:
        options = dict(bias=self.bias, device=device)
        if self.kind.startswith("rnn"):
            options["nonlinearity"] = self.kind[4:]
        name = self.kind[:4].split("_")[0].upper()
        if self.cell:
            return getattr(package, name + "Cell")(self.I, self.H, **options)
        if self.P:
            options["proj_size"] = self.P
        return getattr(package, name)(
            self.I, self.H, self.L, bidirectional=self.D == 2, batch_first=self.batch_first, **options
        )

    def leaves(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        named = {"x": self.x, **dict(zip(("h0", "c0"), self.hx, strict=False)), **self.state}
        return {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in named.items()}


def run_module(case: Case, package, leaves: dict[str, torch.Tensor], **keywords) -> dict[str, torch.Tensor]:
    """The case on torch.nn or fastrnn, in the case's own layout; results time-major and padded."""
    module = case.module(package, "meta")
    hx = tuple(leaves[name] for name in ("h0", "c0") if name in leaves)
    x = leaves["x"]
    if case.cell:
        hx = tuple(h[0] for h in hx)
    elif case.unbatched:
        x, hx = x[:, 0], tuple(h[:, 0] for h in hx)
    elif case.batch_first:
        x = x.transpose(0, 1)
        if "reset" in keywords:
            keywords["reset"] = keywords["reset"].t()
    if case.cell:
        x = x[0]
    elif case.packed:
        x = pack_padded_sequence(x, case.lengths, batch_first=case.batch_first, enforce_sorted=False)
    arguments = (x, None if not hx else hx if case.kind == "lstm" else hx[0])
    weights = {name: leaves[name] for name in case.state}
    result = torch.func.functional_call(module, weights, arguments, keywords)
    if case.cell:
        h, c = result if case.kind == "lstm" else (result, None)
        return {"output": h[None]} | ({} if c is None else {"c_n": c[None]})
    output, last, *states = result
    if case.packed:
        output, _ = pad_packed_sequence(output, batch_first=case.batch_first, total_length=case.T)
    if case.batch_first and not case.unbatched:
        output = output.transpose(0, 1)
    named = {"output": output}
    for suffix, group in zip(("n", "all"), (last, *states), strict=False):
        named |= {
            f"{name}_{suffix}": s for name, s in zip("hc", group if case.kind == "lstm" else [group], strict=False)
        }
    return {name: v.unsqueeze(1 if v.dim() == 2 else 2) for name, v in named.items()} if case.unbatched else named


def plain_loop(case: Case, leaves: dict[str, torch.Tensor], product=torch.mv) -> dict[str, torch.Tensor]:
    """The textbook equations, one row and one step at a time. A reset at t cuts between t - 1 and t both ways."""
    T, B, D, kind, x = case.T, case.B, case.D, case.kind, leaves["x"]

    def weight(kind_of: str, layer: int, d: int):
        return leaves.get(f"weight_{kind_of}" if case.cell else f"weight_{kind_of}_l{layer}{'_reverse' * d}")

    def affine(kind_of: str, layer: int, d: int, v):
        bias = leaves.get(f"bias_{kind_of}" if case.cell else f"bias_{kind_of}_l{layer}{'_reverse' * d}")
        y = product(weight(kind_of, layer, d), v)
        return y if bias is None else y + bias

    def step(layer: int, d: int, v, h, c):
        a, b = affine("ih", layer, d, v), affine("hh", layer, d, h)
        if kind == "lstm":
            i, f, g, o = (a + b).chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            projection = weight("hr", layer, d)
            return (h if projection is None else product(projection, h)), c
        if kind == "gru":
            (ra, za, na), (rb, zb, nb) = a.chunk(3), b.chunk(3)
            z = torch.sigmoid(za + zb)
            return (1 - z) * torch.tanh(na + torch.sigmoid(ra + rb) * nb) + z * h, c
        return (torch.tanh if kind == "rnn_tanh" else torch.relu)(a + b), c

    rows = []
    for b in range(B):
        n = T if case.lengths is None else int(case.lengths[b])
        sequence = [x[t, b] for t in range(n)]
        last, every = [], []
        for layer in range(case.L):
            outputs = []
            for d in range(D):
                start = [leaves[name][layer * D + d, b] if name in leaves else x.new_zeros(size)
                         for name, size in (("h0", case.P or case.H), ("c0", case.H))]  # fmt: skip
                h, c = start
                states = [None] * n
                for t in reversed(range(n)) if d else range(n):
                    border = t + 1 if d else t  # the border that this step's state comes across
                    if case.reset is not None and border < n and case.reset[border, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    h, c = states[t] = step(layer, d, sequence[t], h, c)
                last.append((h, c))
                every.append(states + [(torch.zeros_like(h), torch.zeros_like(c))] * (T - n))
                outputs.append([h for h, _ in states])
            sequence = [torch.cat(pair) for pair in zip(*outputs, strict=True)]
        padding = [x.new_zeros(D * (case.P or case.H))] * (T - n)
        named = {"output": torch.stack(sequence + padding)}
        for i, name in enumerate("hc"):
            named[f"{name}_n"] = torch.stack([state[i] for state in last])
            named[f"{name}_all"] = torch.stack([torch.stack([state[i] for state in states]) for states in every])
        rows.append(named)
    axis = {"output": 1, "h_n": 1, "c_n": 1, "h_all": 2, "c_all": 2}
    return {name: torch.stack([row[name] for row in rows], axis[name]) for name in case.gradients}


def product_by_sum(matrix, vector):
    """The product in another order of summation than torch.mv's: two float64 results then differ by honest rounding."""
    return (matrix * vector).sum(-1)


def with_gradients(case: Case, run, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values and every gradient (or second gradient) of `run(leaves)`, under one set of names."""
    leaves = case.leaves(dtype)
    values = run(leaves)
    if values.keys() != case.gradients.keys():
        raise AssertionError(f"expected the results {', '.join(case.gradients)}, got {', '.join(values)}")
    reached = {
        name: v for name, v in values.items() if v.requires_grad
    }  # not so where every length is zero and hx is absent
    incoming = [case.gradients[name].to(dtype) for name in reached]
    second = case.group == "double backward"
    wanted = list(leaves.values())
    gradients = torch.autograd.grad(list(reached.values()), wanted, incoming, allow_unused=True, create_graph=second)
    if second:
        gradients = torch.autograd.grad(sum((g * g).sum() for g in gradients), wanted, allow_unused=True)
    found = {
        f"d {name}": torch.zeros_like(v) if g is None else g
        for (name, v), g in zip(leaves.items(), gradients, strict=True)
    }
    return {name: v.detach() for name, v in (values | found).items()}


def answers(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the truth in float64, torch's answer in the dtype of the case)"""
    torch_can = case.reset is None and not case.all_states and (case.lengths is None or case.packed)
    if torch_can and case.dtype != torch.float64:
        truth = with_gradients(case, lambda leaves: run_module(case, nn, leaves), torch.float64)
    else:
        truth = with_gradients(case, lambda leaves: plain_loop(case, leaves, product_by_sum), torch.float64)
    run = (lambda leaves: run_module(case, nn, leaves)) if torch_can else (lambda leaves: plain_loop(case, leaves))
    return truth, with_gradients(case, run, case.dtype)


def ours(case: Case) -> dict[str, torch.Tensor]:
    keywords = {}
    if case.reset is not None:
        keywords["reset"] = case.reset
    if case.lengths is not None and not case.packed:
        keywords["lengths"] = case.lengths
    if case.all_states:
        keywords["all_states"] = True
    return with_gradients(case, lambda leaves: run_module(case, fastrnn, leaves, **keywords), case.dtype)


# ---------------------------------------------------------------------------------------------------- the rule


def errors(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Of (tensor, truth) pairs taken as one: relative error in norm, and of the largest element.

    Each pair counts relative to its own truth; against a truth of nothing but zeros only zeros will do.
    """
    square, count, largest = 0.0, 0, 0.0
    for x, truth in pairs:
        difference = x.double() - truth
        if truth.numel() == 0 or not truth.any():
            if difference.any():
                return math.inf, math.inf
            continue
        relative = (difference.norm() / truth.norm()).item()
        square, count = square + relative**2 * truth.numel(), count + truth.numel()
        peak = (difference.abs().max() / truth.abs().max()).item()
        if math.isnan(relative + peak):
            return math.inf, math.inf
        largest = max(largest, peak)
    return math.sqrt(square / max(1, count)), largest


class Tally:
    """What was measured for one group on one instruction set, or for one dtype."""

    def __init__(self):
        self.tensors, self.worst, self.logs, self.failures = 0, 0.0, 0.0, 0

    def add(self, share: float, ratio: float) -> None:
        self.tensors += 1
        self.worst = max(self.worst, share)
        self.logs += math.log(ratio)
        self.failures += share > 1

    def mean(self) -> float:
        return math.exp(self.logs / max(1, self.tensors))


def compare(case: Case, draws: list[tuple[dict, dict, dict]]):
    """Judges one or more draws (fastrnn's answer, the truth, torch's answer) of a case, taken as one.

    Yields, per tensor: what it is, the share of its limit that it uses, and the ratio of its error to torch's.
    """
    judged, small = [], []
    mine, truth, theirs = draws[0]
    for name, want in truth.items():
        got, expected = mine[name], theirs[name].dtype
        if got.shape != want.shape or got.dtype != expected:
            yield f"{name} is {got.dtype} {tuple(got.shape)}, not {expected} {tuple(want.shape)}", math.inf, 1.0
        elif want.numel() < SMALL:
            small.append(name)
        else:
            judged.append([name])
    tiny = TINY[case.dtype]

    def whole(name, which):
        """All draws of a tensor end to end, with their truth: a draw of nearly zero does not decide alone."""
        return tuple(torch.cat([draw[k][name].flatten().double() for draw in draws]) for k in (which, 1))

    for names in [*judged, small] if small else judged:
        norm, largest = errors([whole(name, 0) for name in names])
        norm_torch, largest_torch = errors([whole(name, 2) for name in names])
        share = max(norm / (1.5 * norm_torch + tiny), largest / (3 * (1.5 * largest_torch + tiny)))
        floor = tiny / 200  # far below one rounding: keeps a lucky exact zero out of the logarithm
        yield (
            f"{', '.join(names)}: error {norm:.2e}, torch's {norm_torch:.2e}",
            share,
            max(min(norm, 1e3), floor) / max(norm_torch, floor),
        )


def judge(case: Case, truth: dict, theirs: dict) -> tuple[list[tuple[str, float, float]], bool]:
    """(what `compare` finds, whether it took fresh draws to say)"""
    try:
        draws = [(ours(case), truth, theirs)]
        found = list(compare(case, draws))
        again = any(not share <= 1 for _, share, _ in found)
        if again:
            # Four draws in all, and more until even the smallest tensor has given SMALL numbers.
            fewest = max(1, min(t.numel() for t in truth.values()))
            for i in range(1, max(4, -(-SMALL // fewest))):
                fresh = Case(*case.arguments, again=i)
                draws.append((ours(fresh), *answers(fresh)))
            found = list(compare(case, draws))
        return found, again
    except Exception as error:  # whatever fastrnn raises where torch does not is a finding
        return [(f"{type(error).__name__}: {error}", math.inf, 1.0)], False


def main(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    # torch.nn's own warning, not about fastrnn:
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    in_use = _C.isa()
    isas = [in_use] if args.quick else list(_C.isas())
    dtypes = DTYPES[:1] if args.quick else DTYPES
    cases = [
        (group, kind, dtype, 1000 * args.seed + i)
        for group, n in GROUPS.items()
        for i in range(n)
        for dtype in dtypes
        for kind in KINDS
        if group != "double backward" or dtype.itemsize > 2
    ]
    where = f"{', '.join(isas)}, {torch.get_num_threads()} threads"
    print(f"fastrnn against torch.nn {torch.__version__}: {len(cases)} random cases on {where}.", flush=True)
    by_group = {(group, isa): Tally() for group in GROUPS for isa in isas}
    by_dtype = {dtype: Tally() for dtype in dtypes}
    faults: list[str] = []
    repeated = 0
    try:
        with Progress({"check": len(cases)}) as progress:
            for done, (group, kind, dtype, seed) in enumerate(cases, 1):
                case = Case(group, kind, dtype, seed)
                truth, theirs = answers(case)
                for isa in isas:
                    _C.set_isa(isa)
                    found, again = judge(case, truth, theirs)
                    repeated += again
                    for what, share, ratio in found:
                        by_group[group, isa].add(share, ratio)
                        by_dtype[dtype].add(share, ratio)
                        if not share <= 1:
                            faults.append(f"{isa}, {case}: {what}")
                progress.update(
                    "check",
                    done,
                    f"{group}, {kind}, {str(dtype)[6:]}" + f"  over the limit: {len(faults)}" * bool(faults),
                )
    finally:
        _C.set_isa(in_use)

    rows = [
        [group, *(f"{(t := by_group[group, isa]).tensors} tensors, worst {t.worst:.2f}" for isa in isas)]
        for group in GROUPS
        if by_group[group, isas[0]].tensors
    ]
    print_table(
        "Values and gradients; worst: the largest share of its limit that a tensor used (1.00 is the limit)",
        ["", *isas],
        rows,
    )
    rows = [
        [str(dtype)[6:], str(t.tensors), f"{t.mean():.3f}", f"{t.worst:.2f}", str(t.failures)]
        for dtype, t in by_dtype.items()
    ]
    print_table(
        "Error of fastrnn over error of torch (mean), and the largest share of its limit that a tensor used (worst)",
        ["dtype", "tensors", "geometric mean", "worst", "over limit"],
        rows,
    )
    for fault in faults[:10]:
        print(f"over the limit: {fault}")
    if len(faults) > 10:
        print(f"... and {len(faults) - 10} more")
    if repeated:
        print(
            f"{repeated} of {len(cases) * len(isas)} cases, over the limit at first, were judged on more draws of data."
        )
    tensors, mean = sum(t.tensors for t in by_dtype.values()), by_dtype[torch.float32].mean()
    if mean > MEAN_LIMIT:
        faults.append(f"float32: geometric mean {mean:.3f}, at most {MEAN_LIMIT} expected")
        print(faults[-1])
    seconds = f"({time.monotonic() - begin:.0f} s)"
    if faults:
        print(f"Verdict: BAD. {len(faults)} over the limit in {tensors:,} tensors {seconds}.")
        return 1
    print(f"Verdict: good. {tensors:,} tensors within the limit; float32 error {mean:.2f} times torch's {seconds}.")
    return 0
