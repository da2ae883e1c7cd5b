"""torch.backends.mkldnn.rnn.fp32_precision: what becomes of float32 where "bf16" makes products faster, and that it is
exact elsewhere."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import build, shared_out, tensors_in

import fastrnn
from fastrnn import _C

KINDS = ["RNN_TANH", "LSTM", "GRU"]
SETTINGS = ["none", "ieee", "tf32", "bf16"]
PAIRS = "avx512_bf16"
ROUNDS = (PAIRS, "amx")
only_pairs = pytest.mark.skipif(PAIRS not in _C.isas(), reason="no instruction for pairs of bfloat16 on this machine")


@contextmanager
def asked_for(setting, isa=None):
    """torch's switch, and an instruction set."""
    switch, before = torch.backends.mkldnn.rnn, torch.backends.mkldnn.rnn.fp32_precision
    switch.fp32_precision = setting
    if isa:
        _C.set_isa(isa)
    try:
        yield
    finally:
        switch.fp32_precision = before
        if isa:
            _C.set_isa("")


def numbers(kind, dtype=torch.float32, T=13, B=5, I=11, H=37, seed=0, **options):
    """A call that returns results and gradients, and the same call without gradients."""
    torch.manual_seed(seed)
    rnn = build(kind, I, H, dtype=dtype, **options)
    x = torch.randn(T, B, I, dtype=dtype)

    def call(gradients=True):
        if not gradients:
            with torch.no_grad():
                return tensors_in(rnn(x))
        wanted = [x.clone().requires_grad_(), *rnn.parameters()]
        results = tensors_in(rnn(wanted[0]))
        found = torch.autograd.grad(sum(t.float().square().sum() for t in results), wanted)
        return [t.detach() for t in (*results, *found)]

    return call, rnn, x


def same(found, expected):
    return all(a.equal(b) for a, b in zip(found, expected, strict=True))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_exact_unless_bfloat16_is_asked_for_and_faster(kind, setting, isa):
    call, _, _ = numbers(kind)
    expected = call()
    with asked_for(setting):
        found = call()
    assert same(found, expected) != (setting == "bf16" and isa in ROUNDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_do_not_listen(dtype):
    call, _, _ = numbers("LSTM", dtype)
    expected = call()
    with asked_for("bf16"):
        assert same(call(), expected)


def rounded(t):
    return t.bfloat16().to(t.dtype)


def by_hand(rnn, x):
    """The forward pass in float64, of one layer and direction, the operands of every product rounded to bfloat16."""
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in rnn.parameters())
    w_ih, w_hh, b_ih, b_hh = rounded(w_ih).double(), rounded(w_hh).double(), b_ih.double(), b_hh.double()
    h = c = torch.zeros(x.size(1), rnn.hidden_size, dtype=torch.float64)
    outputs = []
    for x_t in rounded(x).double():
        into, back = x_t @ w_ih.T + b_ih, rounded(h.float()).double() @ w_hh.T + b_hh
        if rnn.mode == "RNN_TANH":
            h = torch.tanh(into + back)
        elif rnn.mode == "LSTM":
            i, f, g, o = (into + back).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (x_r, x_z, x_n), (h_r, h_z, h_n) = into.chunk(3, -1), back.chunk(3, -1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            h = (1 - z) * (x_n + r * h_n).tanh() + z * h
        outputs.append(h)
    return torch.stack(outputs)


@only_pairs
@pytest.mark.parametrize(("B", "I", "H"), [(1, 3, 18), (5, 11, 37), (4, 64, 64), (40, 33, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_rounds_what_is_multiplied_and_nothing_else(kind, B, I, H):
    _, rnn, x = numbers(kind, T=6, B=B, I=I, H=H)
    with torch.no_grad():
        expected = by_hand(rnn, x)
        with asked_for("bf16", PAIRS):
            found = rnn(x)[0]
        exact = rnn(x)[0]
    # A state near the middle of two bfloat16 numbers may be rounded either way: seldom, and by 2^-9 of it.
    assert distance(found, expected) < 2e-4 < 5e-4 < distance(exact, expected)


@only_pairs
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 3}, {"T": 1}, {"T": 1, "B": 1}, {"T": 300, "B": 3}, {"H": 1, "I": 1},
     {"I": 2}, {"B": 70}, {"bias": False}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_bf16_gradients(kind, options):
    """As near to the exact ones as eight bits of an operand allow; the same bits at any number of threads."""
    if kind.endswith("projected"):
        H = max(2, options.get("H", 37))
        kind, options = "LSTM", options | {"H": H, "proj_size": max(1, H // 3)}
    call, _, _ = numbers(kind, **options)
    with asked_for("none", PAIRS):
        expected = call()
    with asked_for("bf16", PAIRS):
        found = call()
        for split, threads in (("serial", 1), ("", 2), ("batch", 3), ("hidden", 3)):
            with shared_out(split, threads):
                assert same(call(), found), (split, threads)
        without = call(gradients=False)
        assert same(without, found[: len(without)])
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert distance(mine, exact) < 0.03


@only_pairs
def test_bf16_keeps_the_state_in_float32():
    """A GRU whose update gate is shut hands its state on as it is, and so does an LSTM its cell."""
    for kind in ("GRU", "LSTM"):
        rnn = fastrnn.accelerate(getattr(torch.nn, kind)(3, 20))
        h = torch.randn(1, 4, 20)
        with torch.no_grad():
            for p in rnn.parameters():
                p.zero_()
            rnn.bias_ih_l0[20:40] = 100  # z of the GRU, f of the LSTM: 1
            hx = h if kind == "GRU" else (torch.zeros(1, 4, 20), h)
            with asked_for("bf16", PAIRS):
                _, last = rnn(torch.randn(50, 4, 3), hx)
        assert (last if kind == "GRU" else last[1]).equal(h)


@only_pairs
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_with_lengths_and_resets(kind):
    """A row of length 0 returns its state untouched; resets cut; no gradient where no step is."""
    torch.manual_seed(3)
    rnn, x = build(kind, 7, 21), torch.randn(9, 4, 7, requires_grad=True)
    h = torch.randn(1, 4, 21)
    hx = (h, h.clone()) if kind == "LSTM" else h
    lengths, reset = torch.tensor([9, 0, 4, 1]), torch.rand(9, 4) < 0.3
    with asked_for("bf16", PAIRS):
        output, last = rnn(x, hx, lengths=lengths, reset=reset)
        one_by_one = []
        for b, length in enumerate(lengths.tolist()):
            if length:
                row = tuple(t[:, b : b + 1] for t in hx) if kind == "LSTM" else h[:, b : b + 1]
                one_by_one.append((b, length, rnn(x[:length, b : b + 1], row, reset=reset[:length, b : b + 1])[0]))
        output.square().sum().backward()
    assert (last[0] if kind == "LSTM" else last)[:, 1].equal(h[:, 1])
    for b, length, alone in one_by_one:
        assert distance(output[:length, b : b + 1], alone) < 1e-3
        assert not output[length:, b].any()
    assert not x.grad[:, 1].any()
    assert x.grad[:9, 0].any()


@only_pairs
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_cells(kind):
    torch.manual_seed(0)
    cell = fastrnn.accelerate(getattr(torch.nn, kind.removesuffix("_TANH") + "Cell")(11, 37))
    for B in (1, 4, 30):
        x = torch.randn(B, 11)
        exact = tensors_in(cell(x))
        with asked_for("bf16", PAIRS):
            found = tensors_in(cell(x))
            grads = torch.autograd.grad(found[0].square().sum(), list(cell.parameters()))
        expected = torch.autograd.grad(exact[0].square().sum(), list(cell.parameters()))
        assert not same(found, exact)
        assert all(distance(a, b) < 0.01 for a, b in zip(found, exact, strict=True))
        assert all(distance(a, b) < 0.03 for a, b in zip(grads, expected, strict=True))


@only_pairs
def test_frozen_weights_are_of_one_precision():
    for kind in ("GRU", "LSTMCell"):
        module = fastrnn.accelerate(getattr(torch.nn, kind)(5, 9)).eval()
        x = torch.randn(6, 8, 5)[0] if kind == "LSTMCell" else torch.randn(6, 8, 5)
        with torch.no_grad():
            exact = tensors_in(module(x))
            with asked_for("bf16", PAIRS):
                rounded_products = tensors_in(module(x))
                module.freeze()
                assert same(tensors_in(module(x)), rounded_products)
                assert same(tensors_in(copy.deepcopy(module)(x)), rounded_products)
            assert same(tensors_in(module(x)), exact)
            module.freeze()
            assert same(tensors_in(module(x)), exact)
            with asked_for("bf16", PAIRS):
                assert same(tensors_in(module(x)), rounded_products)
    assert not same(exact, rounded_products)


@only_pairs
def test_a_compiled_model_keeps_the_precision_it_was_compiled_with():
    rnn, x = fastrnn.accelerate(torch.nn.GRUCell(5, 7)), torch.randn(3, 5)
    with torch.no_grad(), asked_for("bf16", PAIRS):
        compiled = torch.compile(lambda v: rnn(v), fullgraph=True, backend="aot_eager")
        expected = rnn(x)
        assert compiled(x).equal(expected)
        with asked_for("none"):
            assert compiled(x).equal(expected)
            assert not rnn(x).equal(expected)


def test_explain_tells_of_it():
    module, x = fastrnn.LSTM(4, 5), torch.randn(3, 2, 4)
    assert "rounded" not in str(fastrnn.explain(module, x))
    for isa in _C.isas():
        with asked_for("bf16", isa):
            told = str(fastrnn.explain(module, x))
            assert ("products are of numbers rounded to bfloat16" in told) == (isa in ROUNDS)
            assert (f"float32 stays exact: {isa} would not be faster for less" in told) == (isa not in ROUNDS)
            assert "exact" not in str(fastrnn.explain(module.double(), x.double()))
            module.float()
    with asked_for("tf32"):
        assert "float32 stays exact" in str(fastrnn.explain(module, x))


def test_the_operators_name_what_is_wrong():
    weights = [p.detach() for p in fastrnn.GRU(4, 5).parameters()]
    with pytest.raises(RuntimeError, match=r"precision: expected 0 \(exact\), 1 \(tf32\) or 2 \(bf16\), got 3"):
        torch.ops.fastrnn.layer(
            "gru", torch.zeros(3, 2, 4), None, None, weights, None, None, None, False, False, False, False, 3
        )
