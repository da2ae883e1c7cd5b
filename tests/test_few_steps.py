"""Few steps of few rows: products with the weights' own rows, and a projection that packs each group when its turn
comes (csrc/cpu/forward.h, From). Numbers, bits, and where one way ends and the other begins."""

import copy
import itertools

import pytest
import torch
from conftest import KINDS, against_torch, build, dtype_name, equal, normal, shared_out, tensors_in, with_gradients

FEW = [(2, 1), (8, 1), (3, 2), (2, 4), (4, 2)]  # T, B
WIDE = 101


def near(found, expected, bound=2e-6):
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert a.shape == b.shape and (a.double() - b.double()).norm() <= bound * b.double().norm()


# In 16 bits the projection alone goes another way; and no relu, where rounding decides signs.
NUMBERS = [(kind, torch.float32) for kind in [*KINDS, "LSTM projected"]] + [
    (kind, dtype) for kind in ("RNN_TANH", "GRU", "LSTM projected") for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("kind", "dtype"), NUMBERS, ids=[f"{kind}-{dtype_name(dtype)}" for kind, dtype in NUMBERS])
def test_numbers(kind, dtype, rule, isa):
    name, *projected = kind.split()
    for (T, B), (I, H, options) in itertools.product(
        FEW, [(1, 96, {}), (9, 130, {"bias": False}), (70, WIDE, {"bidirectional": True, "num_layers": 2})]
    ):
        extra = {"proj_size": H // 2 + 1} if projected else {}

        def call(rnn, dtype, seed, T=T, B=B, I=I):
            x = normal(T, B, I, dtype=dtype, seed=seed).requires_grad_()
            return with_gradients(rnn(x), [x, *rnn.parameters()])

        def make(module, I=I, H=H, extra=extra, options=options):
            return build(name, I, H, module=module, **extra, **options)

        against_torch(rule, make, call, dtype, f"{kind} T={T} B={B} I={I} H={H} {options}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_where_bits_change(kind, dtype, isa):
    """README: from H = 96 on, where steps times rows are at most eight; of fewer units, one step of at most four rows.
    Kept packed, never."""
    name, *projected = kind.split()
    for H, T, B in [
        *((WIDE, T, B) for T, B in [*FEW, (1, 8), (1, 9), (9, 1), (3, 3), (5, 2), (2, 5), (30, 3)]),
        *((95, T, B) for T, B in [(1, 4), (1, 5), (2, 1), (8, 1), (4, 2)]),
    ]:
        rnn = build(name, 40, H, dtype=dtype, **({"proj_size": 50} if projected else {})).eval()
        x = normal(T, B, 40, dtype=dtype)
        with torch.no_grad():
            found = rnn(x)
            frozen = copy.deepcopy(rnn).freeze()
            kept = frozen(x)
            pieces, state = [], None
            for piece in x.split(2):
                output, state = frozen(piece, state)
                pieces.append(output)
            equal(torch.cat(pieces), kept[0])
        near(found, kept, 2e-6 if dtype == torch.float32 else 1e-14)
        few = (T * B <= 8 if H >= 96 else T == 1 and B <= 4) and isa != "scalar"
        assert found[0].equal(kept[0]) != few, (H, T, B)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_a_call_can_have(kind, isa):
    """Beside the same rows in a batch that is too large for it."""
    rnn = build(kind, 20, WIDE, num_layers=2, bidirectional=True, batch_first=True)
    for T, B in FEW:
        x = normal(9, T, 20)
        lengths = torch.tensor([T, *(i % (T + 1) for i in range(8))])
        reset = torch.rand(9, T, generator=torch.Generator().manual_seed(T)) < 0.4
        start = [normal(4, 1, WIDE, seed=i) for i in range(2 if kind == "LSTM" else 1)]
        for ragged in (False, True):

            def run(rows, ragged=ragged, x=x, lengths=lengths, reset=reset, start=start, T=T):
                part = x[:rows].clone()
                options = {"reset": reset[:rows], "all_states": True}
                options["reset_state"] = tuple(start) if len(start) == 2 else start[0]
                if ragged:
                    options["lengths"] = lengths[:rows]
                    part[torch.arange(T)[None] >= lengths[:rows, None]] = torch.nan  # never read
                return rnn(part.requires_grad_(), **options), part

            (output, hidden, states), part = run(B)
            (whole, hidden_whole, states_whole), all_of_it = run(9)
            near(output, whole[:B])
            near(hidden, [h[:, :B] for h in tensors_in(hidden_whole)])
            near(states, [s[:, :, :B] for s in tensors_in(states_whole)])
            weight = normal(*whole.shape, seed=5)
            (gradient,) = torch.autograd.grad((output * weight[:B]).sum(), part)
            (expected,) = torch.autograd.grad((whole * weight)[:B].sum(), all_of_it)
            near(gradient, expected[:B], 1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_shared_out(kind, isa):
    """The same bits, whoever has which units, rows or steps, and with a projection that is packed as it goes."""
    name, *projected = kind.split()
    extra = {"proj_size": 70} if projected else {}
    for T, B in [*FEW, (12, 1), (3, 20), (90, 1)]:
        rnn = build(name, 33, 130, num_layers=2, bidirectional=B == 1, **extra)
        x = normal(T, B, 33)
        with torch.no_grad():
            with shared_out("serial", 1):
                alone = rnn(x)
            for split, threads in itertools.product(("batch", "hidden", "ahead", "wavefront", ""), (2, 3)):
                with shared_out(split, threads):
                    equal(rnn(x), alone)


def test_rows_do_not_meet():
    """A NaN or an infinity stays in its row."""
    for kind in KINDS:
        rnn, x = build(kind, 33, WIDE), normal(2, 4, 33)
        with torch.no_grad():
            clean = rnn(x)[0]
            x[0, 1], x[1, 2] = torch.nan, torch.inf
            dirty = rnn(x)[0]
        assert dirty[:, 1].isnan().all() and dirty[:, [0, 3]].equal(clean[:, [0, 3]]), kind


@pytest.mark.parametrize("kind", KINDS)
def test_recompute(kind):
    """No chunk is so short that it goes another way than the whole."""
    rnn = build(kind, 7, WIDE)
    for T in range(15, 45):
        x = normal(T, 1, 7).requires_grad_()
        found = []
        for rnn.recompute in (False, True):
            output = rnn(x)[0]
            found.append([output, *torch.autograd.grad(output.square().sum(), x)])
        equal(*found)
