"""Layers whose products go by AMX's tiles, for test_amx.py: it runs this file where the tier is in use, emulated on a
machine without AMX (amx.py). Every case has to have multiplied tiles, or says that it must not (amx_plugin.py).

By the tolerance rule against float64; where torch.nn has no such call, with avx512_bf16's kernels in its place.
"""

import copy
import math
import os
import random
import signal
import threading

import amx
import fastrnn._C as _C
import pytest
import torch
from amx_plugin import EMULATED
from conftest import (
    KINDS,
    against_torch,
    build,
    decide_relu,
    dtype_name,
    equal,
    flat,
    normal,
    pair,
    shared_out,
    tensors_in,
)
from test_accuracy import away_from_zero, describe, draw, run
from test_precision import asked_for, by_hand, distance, numbers, rounded, same
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
import fastrnn.functional as F

SMOOTH = [k for k in KINDS if k != "RNN_RELU"]  # whose gradients have no corner

# ------------------------------------------------------------------------------- random configurations, and torch.nn

HIDDEN, FEATURES, ROWS = [32, 37, 64, 100, 129, 256], [1, 3, 5, 33, 64, 300], [8, 9, 16, 17, 31, 32, 33, 50]


def random_configuration(index):
    """All kinds in turn, all sizes in an order of their own; the same on every machine."""
    r = random.Random(f"tiles {index}")
    kind = KINDS[index % 4]
    hidden, features, batch = HIDDEN[index // 4 % 6], r.choice(FEATURES), r.choice(ROWS)
    layers, directions = r.choice([(1, 1), (1, 1), (2, 1), (1, 2), (2, 2)])
    packed = r.random() < 0.25
    dtype = torch.bfloat16 if index % 5 == 4 else torch.float32
    if kind == "RNN_RELU":  # see away_from_zero: lengths are drawn again as well, and weights may get small
        batch = 33 if packed else batch
        hidden = min(hidden, 64) if dtype == torch.bfloat16 else hidden
    steps = math.ceil(128 / batch) * (3 if packed else 1) + r.randint(0, 5)
    if kind == "RNN_RELU" and hidden > 129:
        layers = 1  # see away_from_zero: not too many units
    proj = r.randint(1, hidden - 1) if kind == "LSTM" and r.random() < 0.3 else 0
    c = dict(
        kind=kind, dtype=dtype, I=features, H=hidden, proj=proj,
        layers=layers, directions=directions, bias=r.random() < 0.7, batch_first=r.random() < 0.4, T=steps, B=batch,
        packed=packed, sorted=r.random() < 0.5, hx=r.random() < 0.6, only_output=r.random() < 0.2, seed=index,
    )  # fmt: skip
    while packed and draw(c)[3].sum() < 128:  # too few for tiles
        c["seed"] += 1000
    return c


def three(c, edit=lambda module: None, input=1.0, incoming=1.0):
    """Ours, torch's in the same dtype, and the truth; with weights that were edited, and data that was scaled."""
    torch.manual_seed(c["seed"])
    projection = {"proj_size": c["proj"]} if c["proj"] else {}
    ours, theirs = pair(
        c["kind"], c["I"], c["H"], num_layers=c["layers"], bias=c["bias"], batch_first=c["batch_first"],
        bidirectional=c["directions"] == 2, dtype=c["dtype"], **projection,
    )  # fmt: skip
    with torch.no_grad():
        edit(theirs)
    x, h0, c0, lengths, dy, dh, dc = away_from_zero(theirs, c) if c["kind"] == "RNN_RELU" else draw(c)
    ours.load_state_dict(theirs.state_dict())
    data = (x * input, h0, c0, lengths, dy * incoming, dh * incoming, dc * incoming)
    mine, torchs = run(ours, c, data, c["dtype"]), run(theirs, c, data, c["dtype"])
    return mine, torchs, run(theirs.double(), c, data, torch.float64)


def check(rule, c, **changes):
    rule.check(lambda n: three(c | {"seed": c["seed"] + 1_000_003 * n}, **changes), c["dtype"], describe(c))


@pytest.mark.parametrize("index", range(96))
def test_random_configuration(index, suite):
    check(suite, random_configuration(index))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_every_pair_of_sizes(hidden, features, suite):
    index = HIDDEN.index(hidden) * 6 + FEATURES.index(features)
    c = random_configuration(index) | dict(
        kind=["LSTM", "GRU", "RNN_TANH"][index % 3], dtype=torch.float32, H=hidden, I=features, proj=0, layers=1,
        B=ROWS[index % 8], T=math.ceil(128 / ROWS[index % 8]), packed=False, seed=500 + index,
    )  # fmt: skip
    check(suite, c)


def test_geometric_mean(suite, no_tiles):
    """Six products of pieces are nearer to the truth than sums of float32 products."""
    assert suite.by_dtype[torch.float32][1] > 700
    assert suite.geometric_mean(torch.float32) <= 1.0
    assert suite.geometric_mean(torch.bfloat16) <= 1.0


def ordinary(kind, **changes):
    return random_configuration(0) | dict(
        kind=kind, dtype=torch.float32, I=33, H=37, proj=0, layers=1, directions=1, bias=True, batch_first=False, T=8,
        B=17, packed=False, hx=True, only_output=False, seed=9,
    ) | changes  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_does_not_drift(kind, dtype, rule):
    c = ordinary(kind, dtype=dtype, I=9, H=32, directions=2, T=300, B=8)
    if kind == "RNN_RELU":
        c |= dict(T=100, directions=1)  # see away_from_zero
    check(rule, c)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("T", "B", "I", "H"), [(2, 100, 5, 129), (2, 130, 64, 256), (2, 600, 33, 32), (1, 700, 5, 37)])
def test_many_rows(T, B, I, H, packed, rule):
    """More than are projected at a time, and more than are gathered for a gradient of weights."""
    for kind in SMOOTH:
        check(rule, ordinary(kind, T=T, B=B, I=I, H=H, packed=packed, directions=2))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_is_laid_out_otherwise(kind):
    """Strided and unaligned inputs, and a gradient that is one number for all, as of a sum."""
    rnn, plain = build(kind, 33, 37), normal(12, 17, 33)
    room = torch.empty(12 * 17 * 33 + 1)
    for x in (plain.transpose(0, 2).contiguous().transpose(0, 2), room[1:].view(12, 17, 33).copy_(plain)):
        found = []
        for given in (plain, x):
            given = given.detach().requires_grad_()
            output = rnn(given)[0]
            found.append([output, *torch.autograd.grad(output.sum(), [given, *rnn.parameters()])])
        equal(*found)
        output = rnn(given)[0]
        equal(torch.autograd.grad(output, [given, *rnn.parameters()], torch.ones_like(output)), found[1][1:])


def weights_times(factor):
    def edit(module):
        for name, p in module.named_parameters():
            if "weight" in name:
                p.mul_(factor)

    return edit


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("kind", SMOOTH)
def test_inputs_of_other_sizes(kind, factor, rule):
    # Few features, or pre-activations would be of a size of which float32 does not know a sigmoid.
    check(rule, ordinary(kind, I=5), input=factor)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10, 1e36])
@pytest.mark.parametrize("kind", SMOOTH)
def test_gradients_of_other_sizes(kind, factor, rule):
    check(rule, ordinary(kind, H=64), incoming=factor)


@pytest.mark.parametrize("factor", [1e-2, 30])
@pytest.mark.parametrize("kind", SMOOTH)
def test_weights_of_other_sizes(kind, factor, rule):
    steps = dict(T=3, B=50) if factor > 1 else {}  # such a GRU is chaotic: soon no two float32 agree
    check(rule, ordinary(kind, **steps), edit=weights_times(factor))


@pytest.mark.parametrize("factor", [1e-12, 1e-30])
@pytest.mark.parametrize("kind", SMOOTH)
def test_tiny_weights_are_left_to_other_kernels(kind, factor, rule, no_tiles):
    check(rule, ordinary(kind), edit=weights_times(factor))


# ------------------------------------------------------------------------------------------ what torch.nn has not


def both_tiers(rule, call, dtype=torch.float32, where=""):
    """The rule, with the kernels beneath in torch's place: call(dtype, seed) -> dict."""

    def three_ways(n):
        found = []
        for tier, kind in ((amx.TIER, dtype), (amx.BENEATH, dtype), (amx.BENEATH, torch.float64)):
            _C.set_isa(tier)
            found.append(call(kind, n))
        _C.set_isa("")
        return found

    rule.check(three_ways, dtype, where)


def in_dtype(dtype, given):
    """`given` as leaves, rounded to what the case is in and then converted."""
    return [None if t is None else t.to(dtype).requires_grad_() for t in given]


def named_gradients(outputs, leaves, seed):
    outs = tensors_in(outputs)
    incoming = [normal(*o.shape, seed=seed + 50 + i).bfloat16().to(o.dtype) for i, o in enumerate(outs)]
    grads = torch.autograd.grad(outs, leaves, incoming, allow_unused=True)
    return {f"output {i}": o for i, o in enumerate(outs)} | {f"gradient {i}": g for i, g in enumerate(grads)}


CALLS = {
    "lengths": dict(lengths=True),
    "reset": dict(reset=True),
    "reset, reset_state, all_states": dict(reset=True, reset_state=True, all_states=True),
    "everything": dict(lengths=True, reset=True, reset_state=True, all_states=True),
    "recompute": dict(recompute=True),
    "recompute, everything": dict(lengths=True, reset=True, reset_state=True, all_states=True, recompute=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [*SMOOTH, "LSTM projected"])
def test_sequences(kind, call, dtype, rule):
    kind, *projected = kind.split()
    options, T, B, I, H = CALLS[call], 40, 17, 33, 37
    P = 21 if projected else H
    shape = dict(num_layers=2, bidirectional=True, recompute=options.get("recompute", False))
    shape |= {"proj_size": P} if projected else {}

    def run_once(kind_of, n):
        torch.manual_seed(n)
        layer = build(kind, I, H, dtype=dtype, **shape).to(kind_of)
        x, *states = in_dtype(
            kind_of, [normal(*s, seed=100 * n + i).to(dtype) for i, s in enumerate([(T, B, I), *4 * [(4, B, H)]])]
        )
        states = [s if i % 2 else s.detach()[..., :P].clone().requires_grad_() for i, s in enumerate(states)]
        hx, start = (tuple(states[i : i + 2]) if kind == "LSTM" else states[i] for i in (0, 2))
        lengths = torch.randint(0, T + 1, (B,))
        named = dict(lengths=lengths) if "lengths" in options else {}
        named |= dict(reset=torch.rand(T, B) < 0.1) if "reset" in options else {}
        named |= dict(reset_state=start) if "reset_state" in options else {}
        outputs = layer(x, hx, all_states="all_states" in options, **named)
        leaves = [x, *flat(hx), *(flat(start) if "reset_state" in options else ()), *layer.parameters()]
        return named_gradients(outputs, leaves, n)

    both_tiers(rule, run_once, dtype, f"{kind} {call}")


@pytest.mark.parametrize(("I", "H"), [(4000, 64), (16000, 32), (40, 1200)])
@pytest.mark.parametrize("kind", ["GRU", "RNN_TANH"])
def test_long_sums(kind, I, H, rule):
    """Of thousands of products. One running sum of them all would lose more than the sums of sums of fma's kernels."""

    def run_once(dtype, n):
        torch.manual_seed(n)
        layer, x = build(kind, I, H).to(dtype), normal(8, 16, I, seed=n).to(dtype).requires_grad_()
        return named_gradients(layer(x)[0], [x, *layer.parameters()], n)

    both_tiers(rule, run_once, where=f"{kind} {I} {H}")


@torch.no_grad()
def of_bfloat16(module):
    """Its weights are bfloat16 numbers, whatever their dtype is."""
    if module.mode == "RNN_RELU":
        decide_relu(module)
    for p in module.parameters():
        p.copy_(rounded(p))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, rule):
    """What is float32 in it and what bfloat16 is torch's matter; the bounds are bfloat16's."""

    def call(nn, dtype, n):
        torch.manual_seed(n)
        module = of_bfloat16(build(kind, 33, 37, module=nn)).to(dtype)
        x = rounded(normal(9, 16, 33, seed=1000 * n)).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            output = module(x)[0]
        output = output.to(dtype)
        incoming = rounded(normal(*output.shape, seed=1000 * n + 1)).to(dtype)
        grads = torch.autograd.grad(output, [x, *module.parameters()], incoming)
        found = {"output": output} | {f"gradient {i}": g for i, g in enumerate(grads)}
        return found if dtype == torch.float64 else {k: t.bfloat16() for k, t in found.items()}

    ways = [(fastrnn, torch.float32), (torch.nn, torch.float32), (torch.nn, torch.float64)]
    rule.check(lambda n: [call(*way, n) for way in ways], torch.bfloat16, kind)


NOT_WORTH_IT = {  # a little on the near side of each bound
    "rows": (40, 7, 64, torch.float32),
    "units": (20, 16, 31, torch.float32),
    "float64": (20, 16, 64, torch.float64),
    "float16": (20, 16, 64, torch.float16),
}


@pytest.mark.parametrize("why", NOT_WORTH_IT)
def test_what_is_not_worth_it_is_done_by_the_kernels_beneath(why, no_tiles):
    T, B, H, dtype = NOT_WORTH_IT[why]
    for kind in KINDS:
        call, *_ = numbers(kind, dtype, T=T, B=B, I=33, H=H)
        found = call()
        _C.set_isa(amx.BENEATH)
        equal(found, call())
        _C.set_isa("")


@pytest.mark.parametrize(("T", "B", "H"), [(16, 8, 32), (1, 128, 32), (4, 32, 45)])
def test_what_is_just_worth_it(T, B, H):
    for kind in KINDS:
        before = amx.products()
        call, *_ = numbers(kind, T=T, B=B, I=1, H=H)
        found = call()
        assert not EMULATED or amx.products() > before
        _C.set_isa(amx.BENEATH)
        assert not same(found, call())
        _C.set_isa("")


# ------------------------------------------------------------------------------------------------------------ same bits

SPLITS = [("serial", 1), ("serial", 3), ("batch", 2), ("batch", 5), ("hidden", 2), ("hidden", 3), ("ahead", 2),
          ("ahead", 4), ("wavefront", 2), ("wavefront", 3), ("", 2), ("", 4)]  # fmt: skip
PRECISIONS = [(torch.float32, "none"), (torch.float32, "tf32"), (torch.float32, "bf16"), (torch.bfloat16, "none")]


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_the_same_bits_however_it_is_shared_out(kind, dtype, precision):
    kind, *projected = kind.split()
    for options in (dict(num_layers=3), dict(bidirectional=True, bias=False)):
        options |= {"proj_size": 35} if projected else {}
        call, *_ = numbers(kind, dtype, T=13, B=21, I=13, H=69, **options)
        with asked_for(precision):
            expected = call()
            equal(call(), expected)
            without = call(gradients=False)
            equal(without, expected[: len(without)])
            for split, threads in SPLITS:
                with shared_out(split, threads):
                    found = call()
                    assert same(found, expected), (options, split, threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_the_same_bits_of_ragged_rows_that_begin_anew(kind, dtype):
    kind, *projected = kind.split()
    T, B, I, H = 19, 21, 13, 69
    rnn = build(kind, I, H, 2, bidirectional=True, dtype=dtype, **({"proj_size": 35} if projected else {}))
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    named = dict(lengths=torch.randint(0, T + 1, (B,)), reset=torch.rand(T, B) < 0.2, all_states=True)

    def call():
        outs = tensors_in(rnn(x, **named))
        return [*outs, *torch.autograd.grad(sum(o.float().square().sum() for o in outs), [x, *rnn.parameters()])]

    expected = call()
    for split, threads in SPLITS:
        with shared_out(split, threads):
            assert same(call(), expected), (split, threads)


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen(kind, dtype, precision):
    """Also a copy; and where a layer's kept tiles do not serve, the kept vectors do."""
    for options in (
        {},
        dict(num_layers=2, bidirectional=True),
        dict(proj_size=20) if kind == "LSTM" else dict(bias=False),
    ):
        module = build(kind, 33, 37, dtype=dtype, **options).eval()
        with torch.no_grad(), asked_for(precision):
            plain = copy.deepcopy(module)
            module.freeze()
            for T, B in ((9, 33), (1, 200), (3, 4), (1, 9)):
                x = normal(T, B, 33, dtype=dtype, seed=T)
                lengths, reset = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.3
                equal(module(x), plain(x))
                equal(copy.deepcopy(module)(x), plain(x))
                equal(module(x, lengths=lengths, reset=reset), plain(x, lengths=lengths, reset=reset))
            packed = pack_padded_sequence(normal(20, 16, 33, dtype=dtype), torch.arange(20, 4, -1))
            equal(module(packed), plain(packed))


@torch.no_grad()
def test_frozen_with_weights_that_tiles_do_not_serve():
    """Of two layers, one goes by tiles; as one wavefront too, and with two threads for both directions."""
    module = fastrnn.GRU(33, 37, num_layers=2).eval()
    module.weight_hh_l1.mul_(1e-12)
    x, plain = normal(20, 16, 33), copy.deepcopy(module)
    expected = plain(x)
    module.freeze()
    for split, threads in SPLITS:
        with shared_out(split, threads):
            equal(module(x), expected)
            equal(plain(x), expected)


@pytest.mark.parametrize("B", [8, 16, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_pieces_gives_the_bits_of_the_whole(kind, B):
    """README: cutting a sequence and carrying the state does, but for one step of at most four rows."""
    rnn, x = build(kind, 33, 37), normal(40, B, 33)
    with torch.no_grad():
        whole = rnn(x)[0]
        for steps in (20, 8, 1):
            outputs, state = [], None
            for piece in x.split(steps):
                output, state = rnn(piece, state)
                outputs.append(output)
            assert torch.cat(outputs).equal(whole), steps


@pytest.mark.parametrize(("T", "B"), [(17, 8), (40, 8), (40, 16), (100, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_recompute_gives_the_same_bits(kind, T, B):
    """README: but for the gradients of weights, which are added up in another order."""
    rnn, x = build(kind, 33, 37), normal(T, B, 33).requires_grad_()
    found = []
    for rnn.recompute in (False, True):
        output = rnn(x)[0]
        found.append([output, *torch.autograd.grad(output.square().sum(), x)])
    equal(*found)


def test_two_python_threads_train_at_once():
    def train(seed, results):
        module = fastrnn.LSTM(33, 37, 2)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.rand(p.shape, generator=g) - 0.5)
        for _ in range(5):
            module.zero_grad()
            module(torch.randn(12, 16, 33, generator=g))[0].square().sum().backward()
            with torch.no_grad():
                for p in module.parameters():
                    p -= 1e-3 * p.grad
        results[seed] = [p.detach() for p in module.parameters()]

    alone, at_once = {}, {}
    for seed in range(2):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, at_once)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        equal(at_once[seed], alone[seed])


def test_a_forked_child():
    """It has the parent's tiles released, and computes the same bits; backward on the one Python thread it has."""
    call, *_ = numbers("LSTM", T=12, B=17, I=33, H=37)
    with torch.autograd.set_multithreading_enabled(False):
        expected = call()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # rather ended than hanging
            os._exit(0 if same(call(), expected) else 3)
        assert os.waitpid(pid, 0)[1] == 0
        equal(call(), expected)


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("kind", SMOOTH)
def test_float32_of_less_precision(kind):
    """Three products of pieces, and one: relative errors against float64 of outputs and of every gradient."""
    bounds = {"none": (0, 5e-7), "ieee": (0, 5e-7), "tf32": (1e-6, 3e-5), "bf16": (5e-4, 2e-2)}
    for options in ({}, dict(num_layers=2, bidirectional=True)):
        call, rnn, x = numbers(kind, T=12, B=17, I=33, H=64, **options)
        found = {}
        for setting in bounds:
            with asked_for(setting):
                found[setting] = call()
        equal(found["ieee"], found["none"])
        inner = [x.double().requires_grad_(), *(p for p in rnn.double().parameters())]
        outs = tensors_in(rnn(inner[0]))
        truth = [*outs, *torch.autograd.grad(sum(t.square().sum() for t in outs), inner)]
        for setting, (least, most) in bounds.items():
            errors = [distance(a, b.detach()) for a, b in zip(found[setting], truth, strict=True)]
            assert least <= min(errors) and max(errors) <= most, (setting, errors)


@pytest.mark.parametrize("setting", ["tf32", "bf16"])
def test_of_other_dtypes_nothing_is_less_precise(setting):
    for dtype in (torch.bfloat16, torch.float64):
        call, *_ = numbers("LSTM", dtype, T=12, B=17, I=33, H=64)
        expected = call()
        with asked_for(setting):
            equal(call(), expected)


@pytest.mark.parametrize(("B", "I", "H"), [(33, 11, 37), (40, 64, 64), (32, 33, 128)])
@pytest.mark.parametrize("kind", SMOOTH)
def test_bf16_rounds_what_is_multiplied_and_nothing_else(kind, B, I, H):
    _, rnn, x = numbers(kind, T=6, B=B, I=I, H=H)
    with torch.no_grad():
        expected = by_hand(rnn, x)
        with asked_for("bf16"):
            found = rnn(x)[0]
        exact = rnn(x)[0]
    assert distance(found, expected) < 2e-4 < 5e-4 < distance(exact, expected)


def test_bf16_multiplies_numbers_that_are_bfloat16_already_exactly():
    """One step from a state of zeros: no rounding is left but of sums."""
    _, rnn, x = numbers("RNN_TANH", T=1, B=130, I=33, H=64)
    with torch.no_grad():
        for p in rnn.parameters():
            p.copy_(rounded(p))
        with asked_for("bf16"):
            found = rnn(rounded(x))[0]
        assert distance(found, rnn.double()(rounded(x).double())[0]) < 3e-7


# ---------------------------------------------------------------------------------------------- the rest of the package


def test_compiled():
    rnn, x = fastrnn.LSTM(33, 37, 2), normal(12, 16, 33)
    weights = list(rnn.parameters())

    def loss(x, weights):
        return F.lstm(x, None, weights, num_layers=2)[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = loss(x, weights)
    found = compiled(x, weights)
    assert found.equal(expected)
    equal(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gradients_of_gradients(kind, rule):
    def call(module, dtype, seed):
        x = normal(8, 17, 33, seed=seed).to(dtype).requires_grad_()
        wanted = [x, *module.parameters()]
        with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's LSTM has no second derivative
            first = torch.autograd.grad(module(x)[0].square().sum(), wanted, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        named = {f"first {i}": g for i, g in enumerate(first)}
        return named | {f"second {i}": g for i, g in enumerate(second)}

    against_torch(rule, lambda nn: build(kind, 33, 37, module=nn), call, where=kind)


@pytest.mark.parametrize("kind", SMOOTH)
def test_gradients_of_each_sample(kind, rule):
    def run_once(dtype, n):
        torch.manual_seed(n)
        module = build(kind, 33, 37).to(dtype)
        weights = {k: v.detach() for k, v in module.named_parameters()}
        x = normal(16, 12, 33, seed=n).to(dtype)

        def loss(weights, row):
            return functional_call(module, weights, (row.unsqueeze(1),))[0].square().sum()

        return vmap(grad(loss), (None, 0))(weights, x)

    both_tiers(rule, run_once, where=kind)


@pytest.mark.parametrize("kind", SMOOTH)
def test_a_probe_says_what_it_says_by_other_kernels(kind):
    layer, x = build(kind, 33, 37, num_layers=2, bidirectional=True), normal(20, 17, 33)
    records = []
    for tier in (amx.TIER, amx.BENEATH):
        _C.set_isa(tier)
        with fastrnn.probe(layer) as probe:
            layer(x, lengths=torch.arange(17) + 4)[0].square().sum().backward()
        records.append([found.last.as_dict() for found in probe.layers()])
    _C.set_isa("")
    assert len(records[0]) == 4
    for ours, theirs in zip(*records, strict=True):
        for name in ("rows", "starts", "h", "h_grad", "h_grad_arrived", "c", "c_grad", "c_grad_arrived"):
            assert ours[name] == theirs[name] or ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        for gate, figures in ours["gates"].items():
            for name, values in figures.items():
                assert values == pytest.approx(theirs["gates"][gate][name], rel=1e-5, abs=1e-6), (gate, name)


def test_cells():
    """Enough rows of one step."""
    for name in ("RNNCell", "GRUCell", "LSTMCell"):
        theirs = getattr(torch.nn, name)(33, 37)
        cell, x = fastrnn.accelerate(copy.deepcopy(theirs)), normal(150, 33)
        found, torchs = tensors_in(cell(x)), tensors_in(theirs(x))
        for a, b, truth in zip(found, torchs, tensors_in(theirs.double()(x.double())), strict=True):
            assert distance(a, truth) <= 1.5 * distance(b, truth) + 2e-7


def test_explain_names_the_tier(no_tiles):
    assert fastrnn.explain(fastrnn.LSTM(33, 37), normal(12, 16, 33)).isa == amx.TIER
