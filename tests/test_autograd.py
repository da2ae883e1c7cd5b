"""Derivatives against finite differences, first and second, and which gradients are computed at all."""

import itertools

import fastrnn._C as _C
import pytest
import torch
from conftest import KINDS, TINY, build, dtype_name, flat, normal, tensors_in
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

CELLS = [*KINDS, "LSTM projected"]
OPTIONS = ["plain", "reset", "lengths", "reset and lengths", "packed", "all states", "batch first", "two layers"]


def function(cell, option, T=4, B=3, I=2, H=3):
    """(f, leaves): the whole module as a function of its input, hx and weights, in float64."""
    kind, *projected = cell.split()
    rnn = build(
        kind, I, H, num_layers=2 if option == "two layers" else 1, bidirectional=True,
        batch_first=option == "batch first", dtype=torch.float64, **({"proj_size": 2} if projected else {}),
    )  # fmt: skip
    if kind == "RNN_RELU":  # finite differences must not step over the corner
        with torch.no_grad():
            for n, p in rnn.named_parameters():
                p.copy_(0.05 * p.sign() if "weight" in n else p.sign() if "bias_ih" in n else 0 * p)
    P, K = 2 if projected else H, len(rnn._all_weights)
    lengths, reset = torch.tensor([2, 4, 0]), torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    options = {}
    if "reset" in option:
        options["reset"] = reset
    if "lengths" in option:
        options["lengths"] = lengths
    if option == "all states":
        options["all_states"] = True
    names = [n for n, _ in rnn.named_parameters()]
    x = normal(*((B, T) if option == "batch first" else (T, B)), I, dtype=torch.float64, seed=1)
    h0, c0 = normal(K, B, P, dtype=torch.float64, seed=2), normal(K, B, H, dtype=torch.float64, seed=3)
    leaves = [v.requires_grad_() for v in (x, h0, c0)] + list(rnn.parameters())

    def f(x, h0, c0, *weights):
        given = pack_padded_sequence(x, [4, 3, 1]) if option == "packed" else x
        hx = (h0, c0) if kind == "LSTM" else h0
        found = torch.func.functional_call(rnn, dict(zip(names, weights, strict=True)), (given, hx), options)
        extra = () if kind == "LSTM" else (c0 * 0,)  # so that every leaf is used
        return (*tensors_in(found), *extra)

    return f, leaves


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, option, isa):
    f, leaves = function(cell, option)
    assert gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_every_element(cell):
    f, leaves = function(cell, "reset and lengths")
    assert gradcheck(f, leaves)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(cell, option):
    f, leaves = function(cell, option, T=4, B=3, I=2, H=3)
    assert gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_a_cell(cell):
    if cell == "LSTM projected":
        cell = "LSTM"  # cells have no projection: the plain one again, with other sizes
    name = cell.split("_")[0] + "Cell"
    options = {"nonlinearity": "relu"} if "RELU" in cell else {}
    module = getattr(fastrnn, name)(3, 4, dtype=torch.float64, **options)
    leaves = [normal(2, n, dtype=torch.float64, seed=n).requires_grad_() for n in (3, 4)]
    f = (lambda x, h: module(x, (h, h.sin()))) if cell == "LSTM" else module
    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_torchs(kind):
    """A gradient penalty, in float64: the same number and the same derivative of it."""
    found = []
    torch.manual_seed(5)
    theirs = build(kind, 3, 5, module=torch.nn, num_layers=2, bidirectional=True, dtype=torch.float64)
    ours = build(kind, 3, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    for rnn in (ours, theirs):
        x = normal(4, 3, 3, dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(rnn(x)[0].square().sum(), x, create_graph=True)
        penalty = (grad.norm() - 1) ** 2
        found.append([penalty, *torch.autograd.grad(penalty, [x, *rnn.parameters()], allow_unused=True)])
    for mine, want in zip(*found, strict=True):
        mine, want = (torch.zeros(1, dtype=torch.float64) if v is None else v for v in (mine, want))
        assert (mine - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
def test_double_backward_in_other_dtypes(kind, dtype, isa):
    """Ragged, with resets and all states: near what float64 gives for the same numbers."""
    rnn = build(kind, 5, 18, num_layers=2, bidirectional=True, dtype=dtype)
    exact = build(kind, 5, 18, num_layers=2, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(rnn.state_dict())
    options = dict(lengths=torch.tensor([6, 0, 3]), reset=torch.rand(6, 3) < 0.3, all_states=True)
    found = []
    for module in (rnn, exact):
        x = normal(6, 3, 5, dtype=dtype).to(module.weight_ih_l0.dtype).requires_grad_()
        loss = sum(t.double().sin().sum() for t in tensors_in(module(x, **options)))
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(torch.autograd.grad((grad * grad.detach()).sum(), [x, *module.parameters()]))
        assert all(g.dtype == module.weight_ih_l0.dtype for g in found[-1])
    for mine, truth in zip(*found, strict=True):
        assert (mine - truth).norm() <= 3 * TINY[dtype] * truth.norm()


@pytest.mark.parametrize("cell", CELLS)
def test_third_derivatives(cell):
    f, leaves = function(cell, "reset and lengths")

    def gradient(*leaves):
        loss = sum(t.sin().sum() for t in f(*leaves))
        return torch.autograd.grad(loss, leaves[0], create_graph=True)[0]

    assert gradgradcheck(gradient, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_create_graph_does_not_change_the_gradient(kind):
    rnn, x = build(kind, 3, 5, dtype=torch.float64), normal(4, 3, 3, dtype=torch.float64).requires_grad_()
    leaves = [x, *rnn.parameters()]
    loss = rnn(x)[0].square().sum()
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    graph = torch.autograd.grad(loss, leaves, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert not a.requires_grad
        assert b.requires_grad
        assert (a - b).norm() <= 1e-13 * a.norm()


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_every_subset_of_gradients(kind):
    """What is asked for does not change what comes: the same bits as when everything is asked for."""
    rnn, x = build(kind, 3, 5, bidirectional=True), torch.randn(4, 3, 3)
    h0, c0 = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    names = ["x", "h0", "c0"] + [n for n, _ in rnn.named_parameters()]

    def gradients(wanted):
        leaves = {"x": x, "h0": h0, "c0": c0} | dict(rnn.named_parameters())
        leaves = {n: v.detach().clone().requires_grad_(n in wanted) for n, v in leaves.items()}
        hx = (leaves["h0"], leaves["c0"]) if kind == "LSTM" else leaves["h0"]
        weights = {n: leaves[n] for n, _ in rnn.named_parameters()}
        output, hidden = torch.func.functional_call(rnn, weights, (leaves["x"], hx))
        loss = output.square().sum() + sum(h.sin().sum() for h in flat(hidden))
        loss.backward()
        return {n: v.grad for n, v in leaves.items()}

    names = [n for n in names if kind == "LSTM" or n != "c0"]
    everything = gradients(names)
    subsets = [[n] for n in names] + [[a, b] for a, b in itertools.combinations(names, 2)] + [names[2:], names[:2]]
    for wanted in subsets:
        found = gradients(wanted)
        for n in names:
            assert (found[n] is not None) == (n in wanted)
            assert n not in wanted or found[n].equal(everything[n]), (n, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_results(kind):
    """Each result alone carries its gradient; an unused last layer still gives None, as torch does."""
    rnn, x = build(kind, 3, 5, num_layers=2), torch.randn(4, 3, 3, requires_grad=True)
    output, hidden, states = rnn(x, all_states=True)
    leaves = [x, *rnn.parameters()]
    parts = [output, *flat(hidden), *flat(states)]
    grads = [torch.autograd.grad(p.sum(), leaves, retain_graph=True, allow_unused=True) for p in parts]
    together = torch.autograd.grad(sum(p.sum() for p in parts), leaves)
    for i, whole in enumerate(together):
        added = sum(g[i].double() for g in grads if g[i] is not None)
        assert (added - whole).norm() <= 2e-6 * whole.double().norm()


def test_no_gradient_where_none_is_due():
    ours, theirs = fastrnn.LSTM(3, 5, 2), torch.nn.LSTM(3, 5, 2)
    for rnn in (ours, theirs):
        x = torch.randn(4, 3, 3)
        output, (h_n, _) = rnn(x)
        h_n[0].sum().backward()  # the first layer's state: the second layer has no part in it
        assert x.grad is None
        assert rnn.weight_hh_l0.grad is not None
        assert rnn.weight_hh_l1.grad is None or (rnn.weight_hh_l1.grad == 0).all()


def test_gradients_accumulate():
    rnn, x = fastrnn.GRU(3, 5), torch.randn(4, 3, 3, requires_grad=True)
    for _ in range(2):
        rnn(x)[0].sum().backward()
    twice = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    rnn(x)[0].sum().backward()
    assert all(a.equal(2 * p.grad) for a, p in zip(twice, rnn.parameters(), strict=True))
    assert len({p.grad.data_ptr() for p in rnn.parameters()}) == 4  # the two biases get memory of their own


def test_incoming_gradients_of_any_strides():
    rnn, x = fastrnn.LSTM(3, 5, bidirectional=True), torch.randn(4, 3, 3, requires_grad=True)
    output, _ = rnn(x)
    incoming = torch.randn(4, 3, 10)
    leaves = [x, *rnn.parameters()]
    wide = torch.zeros(8, 6, 20)
    wide[::2, ::2, ::2] = incoming
    want = torch.autograd.grad(output, leaves, incoming, retain_graph=True)
    for view in (wide[::2, ::2, ::2], incoming.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        assert all(
            a.equal(b) for a, b in zip(torch.autograd.grad(output, leaves, view, retain_graph=True), want, strict=True)
        )
    row = torch.randn(10).expand(4, 3, 10)
    a = torch.autograd.grad(output, leaves, row, retain_graph=True)
    b = torch.autograd.grad(output, leaves, row.contiguous())
    assert all(p.equal(q) for p, q in zip(a, b, strict=True))


def test_the_tier_can_change_between_forward_and_backward():
    """A tape is a tape: whichever kernel wrote it, any can read it."""
    rnn, x = fastrnn.GRU(3, 19), torch.randn(4, 3, 3, requires_grad=True)
    found = []
    for name in _C.isas():
        _C.set_isa("")
        output, _ = rnn(x)
        _C.set_isa(name)
        found.append(torch.autograd.grad(output.sum(), x)[0])
    assert all((g - found[0]).norm() <= 1e-6 * found[0].norm() for g in found)
