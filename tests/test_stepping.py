"""module.step(): equal to forward with one step, onto the caller's memory, allocating nothing."""

import copy

import pytest
import torch
from conftest import DTYPES, KINDS, build, dtype_name, equal, flat, normal
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

import fastrnn

B, I, H, L, T = 5, 4, 9, 3, 6
CELLS = {"RNNCell": 1, "LSTMCell": 2, "GRUCell": 1}
SEQUENCES = [*KINDS, "LSTM projected"]


def sequence(name, dtype=torch.float32, **options):
    kind, *projected = name.split()
    extra = {"proj_size": 4} if projected else {}
    return build(kind, I, H, num_layers=L, dtype=dtype, **extra, **options)


def states_of(rnn, dtype=torch.float32, rows=B, seed=5):
    widths = [getattr(rnn, "proj_size", 0) or H, H]
    lead = (L, rows) if hasattr(rnn, "num_layers") else (rows,)
    lstm = isinstance(rnn, (torch.nn.LSTM, torch.nn.LSTMCell))
    states = [normal(*lead, width, dtype=dtype, seed=seed + i) for i, width in enumerate(widths[: 1 + lstm])]
    return tuple(states) if lstm else states[0]


def near(found, expected, dtype):
    """Of the same numbers added up in another order."""
    bound = {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 2e-2)
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert (a.double() - b.double()).norm() <= bound * b.double().norm() + bound


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("frozen", [False, True])
def test_steps_are_the_sequence(name, dtype, frozen, isa):
    rnn, x = sequence(name, dtype).eval(), normal(T, B, I, dtype=dtype)
    if frozen:
        rnn.freeze()
    hx = states_of(rnn, dtype)
    first = [t.clone() for t in flat(hx)]
    addresses = [t.data_ptr() for t in flat(hx)]
    with torch.no_grad():
        outputs, last = rnn(x, tuple(first) if isinstance(hx, tuple) else first[0])
    for t in range(T):
        output, returned = rnn.step(x[t], hx)
        assert returned is hx and [s.data_ptr() for s in flat(hx)] == addresses
        assert output.data_ptr() == flat(hx)[0][-1].data_ptr()  # the output is the last layer's state
        if dtype in (torch.float32, torch.float64):  # 5 rows: summed as in a sequence
            assert output.equal(outputs[t])
        else:
            near(output, outputs[t], dtype)
    if dtype in (torch.float32, torch.float64):
        equal(hx, last)


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("name", [*SEQUENCES, *CELLS])
def test_few_rows(name, rows):
    """One step of at most four rows is summed in another order."""
    rnn = sequence(name, torch.float64) if name in SEQUENCES else getattr(fastrnn, name)(I, H, dtype=torch.float64)
    hx, x = states_of(rnn, torch.float64, rows), normal(rows, I, dtype=torch.float64)
    with torch.no_grad():
        expected = rnn(x[None], copy.deepcopy(hx))[1] if name in SEQUENCES else rnn(x, copy.deepcopy(hx))
    rnn.step(x, hx)
    near(hx, expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("frozen", [False, True])
def test_cells(name, dtype, frozen):
    cell = getattr(fastrnn, name)(I, H, dtype=dtype)
    if frozen:
        cell.eval().freeze()
    hx, x = states_of(cell, dtype), normal(T, B, I, dtype=dtype)
    other = copy.deepcopy(hx)
    with torch.no_grad():
        for t in range(T):
            other = cell(x[t], other)
            assert cell.step(x[t], hx) is hx
    equal(hx, other)


@pytest.mark.parametrize("name", [*SEQUENCES, *CELLS])
def test_reset_and_reset_state(name):
    rnn = sequence(name) if name in SEQUENCES else getattr(fastrnn, name)(I, H)
    x, reset = normal(B, I), torch.tensor([True, False, False, True, False])
    for start in (None, states_of(rnn, seed=20), states_of(rnn, rows=1, seed=20)):
        hx = states_of(rnn)
        begun = [t.clone() for t in flat(hx)]
        for i, t in enumerate(begun):
            t[..., reset, :] = 0 if start is None else flat(start)[i].expand_as(t)[..., reset, :]
        expected = tuple(begun) if isinstance(hx, tuple) else begun[0]
        rnn.step(x, expected)
        rnn.step(x, hx, reset=reset, reset_state=start)
        equal(hx, expected)


@pytest.mark.parametrize("name", [*SEQUENCES, *CELLS])
def test_unbatched(name):
    rnn = sequence(name) if name in SEQUENCES else getattr(fastrnn, name)(I, H)
    hx, x = states_of(rnn, rows=1), normal(1, I)
    bare = [t.squeeze(-2).clone() for t in flat(hx)]
    bare = tuple(bare) if isinstance(hx, tuple) else bare[0]
    rnn.step(x, hx, reset=torch.tensor([True]))
    output = rnn.step(x[0], bare, reset=torch.tensor(True))
    near(bare, [t.squeeze(-2) for t in flat(hx)], torch.float32)
    assert (output[0] if name in SEQUENCES else flat(output)[0]).dim() == 1


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_memory_is_allocated(name, frozen):
    rnn = sequence(name) if name in SEQUENCES else getattr(fastrnn, name)(I, H)
    if frozen:
        rnn.eval().freeze()
    hx, x = states_of(rnn), normal(B, I)
    reset = torch.tensor([True, False, False, True, False])
    every, one = states_of(rnn, seed=8), states_of(rnn, rows=1, seed=8)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for start in (None, every, one):
            rnn.step(x, hx, reset=reset, reset_state=start)
    assert any("fastrnn::step_" in e.name for e in found.events())
    assert all(e.cpu_memory_usage == 0 for e in found.events())


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "GRU"])
def test_where_the_kernels_do_not_serve(name):
    """Autocast, dropout, inference mode, strided and overlapping arguments: the same meaning."""
    rnn = sequence(name, batch_first=True) if name in SEQUENCES else getattr(fastrnn, name)(I, H)
    x, hx = normal(B, I), states_of(rnn)
    expected = copy.deepcopy(hx)
    rnn.step(x, expected)

    strided = [normal(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t) for t in flat(hx)]
    rnn.step(x, tuple(strided) if isinstance(hx, tuple) else strided[0])
    near(strided, expected, torch.float32)

    with torch.inference_mode():
        inside = copy.deepcopy(hx)
        rnn.step(x, inside)
        equal(inside, expected)
    with torch.autocast("cpu", torch.bfloat16):
        cast = copy.deepcopy(hx)
        rnn.step(x, cast)
        assert all((a - b).norm() <= 0.02 * b.norm() for a, b in zip(flat(cast), flat(expected)))
        assert flat(cast)[0].dtype == torch.float32
    if name in SEQUENCES:
        rnn.dropout = 1.0
        dropped, kept = copy.deepcopy(hx), copy.deepcopy(hx)
        rnn.step(x, dropped)
        assert not flat(dropped)[0][-1].equal(flat(expected)[0][-1])
        rnn.eval().step(x, kept)
        equal(kept, expected)


def test_input_in_the_states_own_memory():
    """A network that is fed its own output."""
    gru = fastrnn.GRU(H, H, num_layers=2)
    h = normal(2, B, H)
    expected = gru(h[1].clone()[None], h.clone())[1]
    gru.step(h[1], h)
    equal(h, expected.detach())
    cell, buffer = fastrnn.LSTMCell(H, H), normal(3, B, H)
    h, c = buffer[0].clone(), buffer[1].clone()
    expected = cell(h, (h, c))
    cell.step(buffer[0], (buffer[0], buffer[1]))
    equal(buffer[:2].unbind(), [t.detach() for t in expected])


@pytest.mark.parametrize("name", ["LSTM", "LSTM projected", "LSTMCell"])
@pytest.mark.parametrize("frozen", [False, True])
def test_states_in_the_same_memory_are_refused(name, frozen):
    rnn = sequence(name) if name in SEQUENCES else getattr(fastrnn, name)(I, H)
    if frozen:
        rnn.eval().freeze()
    h, c = states_of(rnn)
    buffer = normal(2 * h.numel() + c.numel())
    shifted = buffer[: h.numel()].view_as(h), buffer[h.numel() - 1 :][: c.numel()].view_as(c)
    for states in ((h, h) if h.shape == c.shape else shifted, shifted):
        with pytest.raises(ValueError, match="hx: expected h and c in memory of their own"):
            rnn.step(normal(B, I), states)
    rnn.step(normal(B, I), (buffer[: h.numel()].view_as(h), buffer[h.numel() :][: c.numel()].view_as(c)))


@pytest.mark.parametrize("frozen", [False, True])
def test_reset_states_in_the_states_own_memory(frozen):
    gru, x, buffer = fastrnn.GRU(I, H, num_layers=2), normal(B, I), normal(3, B, H)
    if frozen:
        gru.eval().freeze()
    reset, start = torch.ones(B).bool(), buffer[:2].clone()
    expected = gru(x[None], start)[1].detach()
    gru.step(x, buffer[1:], reset=reset, reset_state=buffer[:2])
    near(buffer[1:], expected, torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell"])
def test_states_of_other_dimensions(name, frozen):
    rnn = fastrnn.LSTM(I, H) if name == "LSTM" else fastrnn.GRU(I, H) if name == "GRU" else fastrnn.LSTMCell(I, H)
    if frozen:
        rnn.eval().freeze()
    wrong = normal(1, B, H) if name == "LSTMCell" else normal(B, H)
    hx = (wrong, wrong.clone()) if "LSTM" in name else wrong
    with pytest.raises((RuntimeError, ValueError)):  # torch.nn's words
        rnn.step(normal(B, I), hx)


def test_states_that_require_a_gradient_are_refused():
    gru = fastrnn.GRU(I, H)
    _, h = gru(normal(2, B, I))
    for frozen in (False, True):
        if frozen:
            gru.eval().freeze()
        with pytest.raises(ValueError, match=r"hx: expected states without gradient \(detach\(\) them\)"):
            gru.step(normal(B, I), h)
    gru.step(normal(B, I), h.detach())


def test_nothing_is_written_when_something_is_wrong():
    gru = fastrnn.GRU(I, H, num_layers=2)
    weights = [w.detach() for w in gru.parameters()]
    weights[5] = weights[5][:, 1:]
    h = normal(2, B, H)
    kept = h.clone()
    with pytest.raises(RuntimeError, match=r"weights\[1\] \(w_hh\)"):
        torch.ops.fastrnn.step_(h, None, "gru", normal(B, I), weights, None, 2)
    assert h.equal(kept)


def test_frozen_and_other_dtypes():
    """States of another dtype than the input are no business of the kernels, frozen or not."""
    for kind in ("LSTM", "GRU"):
        rnn = build(kind, I, H, dtype=torch.bfloat16).eval()
        x, wide = normal(T, B, I, dtype=torch.bfloat16), normal(1, B, H)
        hx = (wide, wide.clone()) if kind == "LSTM" else wide
        found = []
        for module in (rnn, copy.deepcopy(rnn).freeze()):
            with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as error:
                module(x, hx)
            found.append(str(error.value))
        assert found[0] == found[1]


def test_torch_notices_the_change():
    """What autograd saved of a state is not silently written over."""
    gru, h = fastrnn.GRUCell(I, H), normal(B, H)
    weight = torch.ones(H, requires_grad=True)
    product = weight * h
    gru.step(normal(B, I), h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert not h.requires_grad


@pytest.mark.parametrize("what", ["plain", "reset", "one reset state", "strided", "autocast", "autocast bfloat16"])
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_one_graph(name, what):
    rnn = sequence(name) if name in SEQUENCES else getattr(fastrnn, name)(I, H)
    x, options = normal(B, I), {}
    if what in ("reset", "one reset state"):
        options["reset"] = torch.tensor([True, False, False, True, False])
    if what == "one reset state":
        options["reset_state"] = states_of(rnn, rows=1, seed=9)
    if what == "autocast bfloat16":
        x = x.bfloat16()
    found = []
    for compiled in (False, True):
        hx = states_of(rnn)
        if what == "strided":
            wide = [normal(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t) for t in flat(hx)]
            hx = tuple(wide) if isinstance(hx, tuple) else wide[0]

        def f(x, hx):
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in what):
                rnn.step(x, hx, **options)
                rnn.step(x, hx)
            return flat(hx)[0] * 2

        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=True):
            result = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(x, hx)
        found.append([result, *flat(hx)])
    equal(*found)


@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_opcheck(cell):
    rnn = {
        "rnn_relu": lambda: build("RNN_RELU", I, H),
        "lstm": lambda: fastrnn.LSTM(I, H),
        "gru": lambda: fastrnn.GRU(I, H),
    }
    weights = [w.detach() for w in rnn[cell]().parameters()]
    h, c = normal(1, B, H), normal(1, B, H, seed=2) if cell == "lstm" else None
    reset = torch.tensor([True, False, False, True, False])
    for more in ((), (reset,), (reset, h.clone(), None if c is None else c.clone())):
        opcheck(torch.ops.fastrnn.step_.default, (h, c, cell, normal(B, I), weights, None, 1, *more))


def test_what_is_wrong_is_named():
    lstm, gru, cell = fastrnn.LSTM(I, H, num_layers=2), fastrnn.GRU(I, H), fastrnn.GRUCell(I, H)
    x, h, c = normal(B, I), normal(2, B, H), normal(2, B, H)
    for module, hx, options, error, message in [
        (lstm, h, {}, TypeError, r"hx: expected a pair \(h, c\) of tensors to write to, got Tensor"),
        (lstm, None, {}, TypeError, r"hx: expected a pair \(h, c\) of tensors to write to, got NoneType"),
        (gru, None, {}, TypeError, "hx: expected tensors to write to, got NoneType"),
        (gru, h, {}, RuntimeError, r"Expected hidden size \(1, 5, 9\), got \[2, 5, 9\]"),
        (gru, h[:1].double(), {}, (RuntimeError, ValueError), "dtype"),
        (gru, h[:1], {"reset": torch.ones(B)}, TypeError, "reset: expected a tensor of torch.bool, got torch.float32"),
        (
            gru,
            h[:1],
            {"reset": torch.ones(1, B).bool()},
            ValueError,
            r"reset: expected shape \(B,\) = \(5,\), got .*1, 5",
        ),
        (lstm, (h, c), {"reset": torch.ones(B).bool(), "reset_state": h}, TypeError, r"reset_state: expected a pair"),
        (
            cell,
            h[0],
            {"reset": torch.ones(B).bool(), "reset_state": h[0, :, :2]},
            ValueError,
            "reset_state: expected shape",
        ),
        (fastrnn.GRU(I, H, bidirectional=True), h, {}, ValueError, "step: expected a module of one direction"),
    ]:
        kept = [t.clone() for t in flat(hx) if t is not None]
        with pytest.raises(error, match=message):
            module.step(x, hx, **options)
        if kept:
            equal(hx, kept)
    with pytest.raises(ValueError, match=r"input: expected shape \(B, I\) or \(I,\), got \(1, 5, 4\)"):
        gru.step(x[None], h[:1])
    with pytest.raises(TypeError, match="input: expected a tensor, got list"):
        gru.step([1.0], h[:1])
    packed = torch.ops.fastrnn.pack("gru", [w.detach() for w in gru.parameters()], False, 1)
    step = torch.ops.fastrnn.step_
    with pytest.raises(RuntimeError, match="c: expected memory of its own, got some of h's"):
        step(h, h, "lstm", x, [w.detach() for w in lstm.parameters()], None, 2)
    with pytest.raises(RuntimeError, match=r"packed: expected 2 layer\(s\) of one direction, got 1 of 1"):
        step(h, None, "", x, [], packed, 2)
    with pytest.raises(RuntimeError, match="h: expected a contiguous tensor to write to"):
        step(normal(1, B, 2 * H)[..., ::2], None, "", x, [], packed, 1)
