"""RNNCell, LSTMCell and GRUCell: torch.nn's contract and numbers, one step at a time."""

import copy
import pickle

import pytest
import torch
from conftest import DTYPES, SIXTEEN, against_torch, decide_relu, dtype_name, normal, tensors_in, with_gradients
from torch import nn

import fastrnn

CELLS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("GRUCell", {}), ("LSTMCell", {})]
IDS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]


def build(module, name, *sizes, **options):
    cell = getattr(module, name)(*sizes, **options)
    if options.get("nonlinearity") == "relu" and options.get("bias", True):
        decide_relu(cell)
    return cell


def step(name, I, H, B, hidden=True, wanted=("x", "h", "parameters")):
    def call(cell, dtype, seed):
        shape = () if B is None else (B,)
        x = normal(*shape, I, dtype=dtype, seed=seed).requires_grad_()
        h, c = (normal(*shape, H, dtype=dtype, seed=seed + i).requires_grad_() for i in (1, 2))
        hx = None if not hidden else (h, c) if name == "LSTMCell" else h
        leaves = [x, *cell.parameters()] + ([h] if hidden else []) + ([c] if hidden and name == "LSTMCell" else [])
        return with_gradients(cell(x, hx), leaves)

    return call


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=dtype_name)
@pytest.mark.parametrize(("name", "options"), CELLS, ids=IDS)
def test_numbers(name, options, dtype, rule, isa):
    for I, H, B in [
        (1, 1, 1),
        (5, 7, 4),
        (3, 18, 2),
        (40, 25, 1),
        (17, 128, 3),
        (9, 96, 5),
        (33, 101, 8),
        (64, 64, 33),
        (5, 7, None),
    ]:
        if dtype in SIXTEEN and H == 1:
            continue  # one number: nothing to take a norm of
        for hidden in (True, False):
            for bias in (True, False) if "nonlinearity" not in options else (True,):
                against_torch(
                    rule,
                    lambda module, s=(I, H), b=bias: build(module, name, *s, bias=b, **options),
                    step(name, I, H, B, hidden),
                    dtype,
                    f"{name} I={I} H={H} B={B} hidden={hidden} bias={bias}",
                )
    assert rule.configurations >= 12


@pytest.mark.parametrize(("batch", "H"), [(1, 19), (4, 19), (5, 19), (8, 101), (9, 101)])
@pytest.mark.parametrize(("name", "options"), CELLS, ids=IDS)
def test_a_sequence_of_steps_is_the_sequence(name, options, batch, H, isa):
    """Bit for bit above four rows, eight of wide layers; one step of fewer is summed in another order (csrc/cpu/pack.h,
    few_enough_for_dots)."""
    cell = getattr(fastrnn, name)(5, H, **options)
    rnn = getattr(fastrnn, name.removesuffix("Cell"))(5, H, **options)
    rnn.load_state_dict({n + "_l0": p for n, p in cell.state_dict().items()})
    x, state, outputs = torch.randn(7, batch, 5), None, []
    for t in range(7):
        state = cell(x[t], state)
        outputs.append(state[0] if name == "LSTMCell" else state)
    output, hidden = rnn(x)
    steps = [torch.stack(outputs), *(h.unsqueeze(0) for h in tensors_in(state))]
    for one, whole in zip(steps, [output, *tensors_in(hidden)], strict=True):
        if batch > (4 if H < 96 else 8):
            assert one.equal(whole)
        else:
            assert (one - whole).norm() <= 5e-7 * whole.norm()


@pytest.mark.parametrize(("name", "options"), CELLS, ids=IDS)
def test_contract(name, options):
    torch.manual_seed(3)
    theirs = getattr(nn, name)(5, 7, **options)
    torch.manual_seed(3)
    cell = getattr(fastrnn, name)(5, 7, **options)
    assert isinstance(cell, getattr(nn, name))
    assert repr(cell) == repr(theirs)
    assert all(a.equal(b) for a, b in zip(cell.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(4, 5)
    expected = tensors_in(cell(x))
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), copy.deepcopy(cell).share_memory()):
        assert all(a.equal(b) for a, b in zip(tensors_in(other(x)), expected, strict=True))
    assert getattr(fastrnn, name)(5, 7, bias=False, **options).bias_ih is None
    meta = getattr(fastrnn, name)(5, 7, device="meta", **options)(x.to("meta"))
    assert all(t.device.type == "meta" and t.shape == (4, 7) for t in tensors_in(meta))
    weights = {n: torch.randn_like(p) for n, p in cell.named_parameters()}
    found = torch.func.functional_call(cell, weights, (x,))
    cell.load_state_dict(weights)
    assert all(a.equal(b) for a, b in zip(tensors_in(found), tensors_in(cell(x)), strict=True))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell"])
def test_hidden_size_zero_is_legal(name):
    for module in (nn, fastrnn):
        output = getattr(module, name)(5, 0)(torch.randn(3, 5))
        assert output.shape == (3, 0)


@pytest.mark.parametrize(("name", "options"), CELLS, ids=IDS)
def test_empty_batch(name, options):
    x = torch.randn(0, 5, requires_grad=True)
    for module in (nn, fastrnn):
        found = tensors_in(getattr(module, name)(5, 7, **options)(x))
        assert all(t.shape == (0, 7) for t in found)
        torch.autograd.grad(found[0].sum(), x)


def test_only_one_output_has_a_gradient(rule):
    for part in (0, 1):

        def call(cell, dtype, seed, part=part):
            x, h, c = (normal(4, n, dtype=dtype, seed=seed + i).requires_grad_() for i, n in enumerate((5, 7, 7)))
            return with_gradients(cell(x, (h, c))[part], [x, h, c, *cell.parameters()])

        against_torch(rule, lambda module: module.LSTMCell(5, 7), call)


def test_in_place_change_of_the_state_before_backward():
    cell, x = fastrnn.GRUCell(5, 7), torch.randn(4, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(cell(x).relu().sum(), x)
    h = cell(x)
    h.relu_()
    (found,) = torch.autograd.grad(h.sum(), x)
    assert found.equal(expected)


def test_unknown_nonlinearity_is_torchs_error():
    texts = []
    for module in (nn, fastrnn):
        cell = module.RNNCell(5, 7, nonlinearity="sine")
        with pytest.raises(RuntimeError) as caught:
            cell(torch.randn(4, 5))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("name", "options"), CELLS, ids=IDS)
@pytest.mark.parametrize("low", SIXTEEN, ids=dtype_name)
@pytest.mark.parametrize("hidden", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_dtypes_are_torchs(name, options, low, hidden):
    found = []
    for module in (nn, fastrnn):
        hx = None if hidden is None else torch.zeros(4, 7, dtype=hidden)
        hx = (hx, hx.clone()) if name == "LSTMCell" and hx is not None else hx
        try:
            with torch.autocast("cpu", dtype=low):
                found.append(
                    [t.dtype for t in tensors_in(getattr(module, name)(5, 7, **options)(torch.randn(4, 5), hx))]
                )
        except RuntimeError as error:
            found.append(str(error))
    if isinstance(found[0], list):  # where torch has no result, ours may have one
        assert found[0] == found[1]
