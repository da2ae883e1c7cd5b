"""Few hidden units in many rows, a vector for a unit of as many rows as it has lanes (csrc/cpu/forward_lanes.h): the
same bits as row by row, as calls with `lengths` go."""

import itertools

import pytest
import torch
from conftest import ISAS, KINDS, against_torch, build, equal, normal, shared_out, tensors_in, with_gradients

# H, I, B: few units, a vector and more, none left over; rows that fill vectors and a rest of them.
SIZES = [(10, 5, 16), (18, 1, 33), (20, 32, 64), (25, 9, 17), (40, 40, 31), (1, 3, 40), (50, 20, 64), (32, 9, 32)]

# Where a vector has one lane, rows go by rows.
vectors = pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"], indirect=True)


def states(kind, D, B, H, dtype):
    made = [normal(D, B, H, dtype=dtype, seed=i) for i in (1, 2)]
    return tuple(made) if kind == "LSTM" else made[0]


@vectors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_rows(kind, dtype, isa):
    for (H, I, B), bias, D, given in itertools.product(SIZES, (True, False), (1, 2), (True, False)):
        rnn = build(kind, I, H, bias=bias, bidirectional=D == 2, num_layers=2, dtype=dtype)
        x = normal(11, B, I, dtype=dtype)
        hx = states(kind, 2 * D, B, H, dtype) if given else None
        with torch.no_grad():
            by_rows = rnn(x, hx, lengths=torch.full((B,), 11), all_states=True)
            equal(rnn(x, hx, all_states=True), by_rows)
            by_rows = by_rows[:2]
            equal(rnn(x, hx), by_rows)
            for split in ("serial", "batch", "wavefront", "hidden"):
                with shared_out(split, 2):
                    equal(rnn(x, hx), by_rows)
            equal(rnn.eval().freeze()(x, hx), by_rows)


@vectors
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, isa):
    """From the same tape: the same bits."""
    for H, I, B in SIZES:
        rnn = build(kind, I, H, num_layers=2, bidirectional=True)
        x = normal(9, B, I).requires_grad_()
        wanted = [x, *rnn.parameters()]
        equal(
            list(with_gradients(rnn(x), wanted).values()),
            list(with_gradients(rnn(x, lengths=torch.full((B,), 9)), wanted).values()),
        )


@vectors
@pytest.mark.parametrize("kind", KINDS)
def test_numbers(kind, rule, isa):
    for H, I, B in SIZES:
        if kind == "RNN_RELU" and H == 1:
            continue  # a unit that is never active has no numbers

        def call(rnn, dtype, seed, B=B, I=I):
            x = normal(20, B, I, dtype=dtype, seed=seed).requires_grad_()
            with torch.no_grad():
                alone = {f"without gradients {i}": t for i, t in enumerate(tensors_in(rnn(x)))}
            return alone | with_gradients(rnn(x), [x, *rnn.parameters()])

        def make(module, H=H, I=I):
            return build(kind, I, H, module=module, bidirectional=True)

        against_torch(rule, make, call, torch.float32, f"{kind} H={H} I={I} B={B}")


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_layouts(kind):
    """Rows apart, steps apart, an expanded row, steps turned round, the batch first."""
    rnn, first = build(kind, 6, 20), build(kind, 6, 20, batch_first=True)
    first.load_state_dict(rnn.state_dict())
    wide, same = normal(11, 80, 20), torch.full((40,), 11)
    views = (wide[:, ::2, 4:10], wide[:, 10:50, :6], wide[:, :1, :6].expand(11, 40, 6), wide[:, :40].flip(0)[..., :6])
    with torch.no_grad():
        for x in views:
            expected = rnn(x, lengths=same)
            equal(rnn(x), expected)
            equal(first(x.transpose(0, 1))[0].transpose(0, 1), expected[0])


def test_rows_do_not_meet():
    for kind in KINDS:
        rnn, x = build(kind, 6, 20), normal(11, 40, 6)
        with torch.no_grad():
            clean = rnn(x)[0]
            x[3, 7], x[5, 30] = torch.nan, torch.inf
            dirty = rnn(x)[0]
        others = [b for b in range(40) if b not in (7, 30)]
        assert dirty[3:, 7].isnan().all() and dirty[:, others].equal(clean[:, others]), kind
