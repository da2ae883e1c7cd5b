"""reset_state=: what it means in terms of everything else, its operators, and what is wrong with an argument.

Its values and gradients against a loop over the plain equations are in test_sequences.py, under torch.func and
create_graph in test_transforms.py, under the sanitizers in tests/csrc/driver.cpp.
"""

import pytest
import torch
from conftest import DTYPES, KINDS, build, dtype_name, equal, flat, normal
from torch.library import opcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn
import fastrnn.functional as F

T, B, I, H, L = 7, 4, 3, 6, 2
OPS = torch.ops.fastrnn


def start_for(rnn, rows, dtype=torch.float32, seed=3):
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h = normal(layers, rows, rnn.proj_size or rnn.hidden_size, dtype=dtype, seed=seed)
    c = normal(layers, rows, rnn.hidden_size, dtype=dtype, seed=seed + 1)
    return (h, c) if rnn.mode == "LSTM" else h


def resets():
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = reset[3, 0] = reset[5, 0] = reset[2, 3] = True
    return reset


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_state_is_the_state_of_a_call_that_begins_there(kind):
    rnn, x = build(kind, I, H, num_layers=L), normal(T, B, I)
    start, reset = start_for(rnn, B), torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    output, hidden = rnn(x, reset=reset, reset_state=start)
    first, (second, last) = rnn(x[:4])[0], rnn(x[4:], start)
    equal([output, *flat(hidden)], [torch.cat([first, second]), *flat(last)])
    reset[4], reset[0] = False, True  # at the beginning it takes the place of hx
    equal(rnn(x, start_for(rnn, B, seed=9), reset=reset, reset_state=start), rnn(x, start))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_no_reset_state_and_one_row_is_every_row(kind):
    rnn, x = build(kind, I, H, num_layers=L, bidirectional=True), normal(T, B, I)
    zeros, one = start_for(rnn, B), start_for(rnn, 1)
    zeros = tuple(torch.zeros_like(t) for t in zeros) if kind == "LSTM" else torch.zeros_like(zeros)
    every = tuple(t.repeat(1, B, 1) for t in one) if kind == "LSTM" else one.repeat(1, B, 1)
    equal(rnn(x, reset=resets(), reset_state=zeros), rnn(x, reset=resets()))
    equal(rnn(x, reset=resets(), reset_state=one), rnn(x, reset=resets(), reset_state=every))
    equal(rnn(x, reset_state=one), rnn(x))  # without resets nothing starts from it


@pytest.mark.parametrize("kind", KINDS)
def test_the_functions_and_packed_sequences(kind):
    rnn, x = build(kind, I, H, num_layers=L, bidirectional=True), normal(T, B, I)
    start, lengths = start_for(rnn, B), torch.tensor([5, 7, 1, 6])
    expected, hidden = rnn(x, reset=resets(), reset_state=start, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, last = rnn(packed, reset=resets(), reset_state=start)
    equal([pad_packed_sequence(output, total_length=T)[0], last], [expected, hidden])
    function = {"LSTM": F.lstm, "GRU": F.gru}.get(kind, F.rnn)
    extra = {"nonlinearity": kind[4:].lower()} if function is F.rnn else {}
    weights, options = list(rnn.parameters()), dict(reset=resets(), reset_state=start, lengths=lengths)
    equal(function(x, None, weights, True, L, bidirectional=True, **extra, **options), (expected, hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_modules_use_it_too(kind):
    rnn, x = build(kind, I, H, num_layers=L).eval(), normal(T, B, I)
    start = start_for(rnn, B)
    with torch.no_grad():
        expected = rnn(x, reset=resets(), reset_state=start)
        equal(rnn.freeze()(x, reset=resets(), reset_state=start), expected)
    learned = flat(start)[0].requires_grad_()
    output, _ = rnn(x, reset=resets(), reset_state=start)
    assert torch.autograd.grad(output.sum(), learned)[0].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_learned_beside_frozen_weights(kind):
    """The gradient is that of the state a call begins with, added up over the calls that begin there."""
    rnn, x = build(kind, I, H, num_layers=L).requires_grad_(False), normal(T, B, I)
    start = start_for(rnn, 1)
    leaves = [t.requires_grad_() for t in flat(start)]
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = reset[5] = True
    weight = normal(T, B, H, seed=11)
    found = torch.autograd.grad((rnn(x, reset=reset, reset_state=start)[0] * weight).sum(), leaves)
    every = tuple(t.expand(-1, B, -1) for t in flat(start))
    every = every if kind == "LSTM" else every[0]
    pieces = torch.cat([rnn(x[:2])[0], rnn(x[2:5], every)[0], rnn(x[5:], every)[0]])
    expected = torch.autograd.grad((pieces * weight).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_autocast(kind):
    rnn, x = build(kind, I, H, num_layers=L), normal(T, B, I)
    leaves = [t.requires_grad_() for t in flat(start_for(rnn, B))]
    start = tuple(leaves) if kind == "LSTM" else leaves[0]

    def f(v):
        return rnn(v, reset=resets(), reset_state=start)[0]

    expected = torch.autograd.grad(f(x).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(f, x, use_reentrant=False).square().sum(), leaves)
    equal(again, expected)
    with torch.autocast("cpu", torch.bfloat16):
        output = f(x)
        assert output.dtype == build(kind, I, H, module=torch.nn)(x)[0].dtype
        assert (output - f(x.bfloat16())).norm() <= 0.02 * output.norm()
    found = torch.autograd.grad(output.float().square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 0.05 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph(kind):
    rnn, x = build(kind, I, H, num_layers=L, bidirectional=True), normal(T, B, I).requires_grad_()
    leaves = [t.requires_grad_() for t in flat(start_for(rnn, 1))]
    start = tuple(leaves) if kind == "LSTM" else leaves[0]
    function = {"LSTM": F.lstm, "GRU": F.gru}.get(kind, F.rnn)
    extra = {"nonlinearity": kind[4:].lower()} if function is F.rnn else {}

    weights = list(rnn.parameters())

    def f(v, reset, start):
        output, hidden = function(
            v, None, weights, True, L, bidirectional=True, reset=reset, reset_state=start, **extra
        )
        return [output, *flat(hidden)]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    wanted = [x, *leaves, *rnn.parameters()]
    found, expected = compiled(x, resets(), start), f(x, resets(), start)
    equal(found, expected)
    equal(*(torch.autograd.grad(sum(o.square().sum() for o in outs), wanted) for outs in (found, expected)))


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_opcheck(cell, dtype, states):
    """Of the operators with reset states, and of those whose states are float32 where input is not."""
    if dtype == torch.float32:
        states = dtype
    gates, lstm = {"rnn_tanh": 1, "lstm": 4, "gru": 3}[cell], cell == "lstm"

    def weights(I):
        shapes = [(gates * H, I), (gates * H, H), (gates * H,), (gates * H,)]
        return [0.3 * normal(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]

    def state(layers, seed):
        return normal(layers, B, H, dtype=states, seed=seed)

    x = normal(T, B, I, dtype=dtype)
    for layers in (1, 2):
        h0, c0, h_reset, c_reset = (state(layers, s) if s % 2 or lstm else None for s in (1, 2, 3, 4))
        all_weights = weights(I) + (weights(H) if layers == 2 else [])
        given = (cell, x, h0, c0, all_weights, None, None, resets())
        n, last = len(all_weights), (0, h_reset, c_reset)
        needs = [True, True, lstm] + [True] * n + [True, lstm]
        if layers == 1:
            forward = (*given, False, False, True, True, *last)
            output, h_n, c_n, h_all, c_all, tape = OPS.layer(*forward)
            assert h_n.dtype == states and output.dtype == dtype
            opcheck(OPS.layer.default, forward)
            incoming = (output, h_n, c_n if lstm else None, h_all, c_all if lstm else None)
            backward = (*given, tape, *incoming, False, False, needs, *last)
            opcheck(OPS.layer_backward.default, backward)
            found = OPS.layer_backward(*backward)
            operands = (*given, tape, *incoming, False, False, needs[:3] + needs[-2:], h_reset, c_reset)
            opcheck(OPS.layer_operands.default, operands)
            if dtype == torch.float32:  # operands are of exact products
                equal(OPS.layer_operands(*operands)[1:5], found[1:3] + found[-2:])
        else:
            output, h_n, c_n, saved = OPS.stack(*given, False, False, 2, 0, *last)
            opcheck(OPS.stack.default, (*given, False, False, 2, 0, *last))
            backward = (*given, saved, output, h_n, c_n if lstm else None, False, False, 2, needs, *last)
            opcheck(OPS.stack_backward.default, backward)
            found = OPS.stack_backward(*backward)
        assert {g.dtype for g, needed in zip(found, needs) if needed} == {states}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_what_is_wrong_is_named(dtype):
    lstm, gru = (build(kind, I, H, num_layers=L, dtype=dtype) for kind in ("LSTM", "GRU"))
    x, reset = normal(T, B, I, dtype=dtype), resets()
    h, other = normal(L, B, H, dtype=dtype), torch.float64 if dtype != torch.float64 else torch.float32
    for rnn, start, error, message in [
        (lstm, h, TypeError, r"reset_state: expected a pair \(h, c\), got Tensor"),
        (lstm, (h, None), TypeError, r"reset_state\[1\]: expected a tensor, got NoneType"),
        (
            lstm,
            (h, h[:, :2]),
            ValueError,
            r"reset_state\[1\]: expected shape \(2, 4, 6\), or \(2, 1, 6\) .* \(2, 2, 6\)",
        ),
        (gru, (h, h), TypeError, "reset_state: expected a tensor, got tuple"),
        (gru, h[:1], ValueError, r"reset_state: expected shape \(2, 4, 6\), .* got \(1, 4, 6\)"),
        (gru, h.to(other), ValueError, f"reset_state: expected dtype {dtype} as input's, got {other}"),
        (gru, h.to("meta"), ValueError, "reset_state: expected device cpu as input's, got meta"),
    ]:
        for options in ({}, {"reset": reset}):
            with pytest.raises(error, match=message):
                rnn(x, reset_state=start, **options)
    with pytest.raises(ValueError, match=r"reset_state: expected shape \(2, 6\), got \(2, 4, 6\)"):
        gru(x[:, 0], reset=reset[:, 0], reset_state=h)
    with pytest.raises(ValueError, match="reset_state: expected shape"):
        F.gru(x, None, list(gru.parameters()), num_layers=L, reset=reset, reset_state=h[0])
    assert "reset_state" in fastrnn.GRU.forward.__doc__
