"""Training through the sequence classes: autograd's corners, dropout, autocast, sizes and values at the edge."""

import copy
import warnings

import pytest
import torch
from conftest import KINDS, SIXTEEN, against_torch, build, dtype_name, flat, normal, pair, tensors_in, with_gradients
from test_modules import CLASSES, bits, data, train
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn

# Autograd as a whole.


@pytest.mark.parametrize("kind", KINDS)
def test_retain_graph_twice(kind):
    rnn, x = build(kind, 5, 7, num_layers=2), data()
    output, _ = rnn(x)
    wanted = [x, *rnn.parameters()]
    first = torch.autograd.grad(output.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(output.sum(), wanted, retain_graph=True)
    assert bits(first, second)
    torch.autograd.grad(output.sum(), wanted)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_in_eval_mode(kind, rule):
    against_torch(rule, lambda module: build(kind, 5, 7, module=module, num_layers=2).eval(), train)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    rnn, x = fastrnn.LSTM(5, 7, num_layers=2, dropout=0.5), data()
    results = []
    for run in (lambda: rnn(x)[0], lambda: checkpoint(lambda v: rnn(v)[0], x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        output = run()
        rnn.zero_grad()
        x.grad = None
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in rnn.parameters())])
    assert bits(*results)


def test_saved_tensor_hooks():
    rnn, x = fastrnn.GRU(5, 7, bidirectional=True), data()
    expected = torch.autograd.grad(rnn(x)[0].sum(), [x, *rnn.parameters()])
    packed = []

    def pack(t):
        packed.append(t)
        return t.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, _ = rnn(x)
    assert bits(torch.autograd.grad(output.sum(), [x, *rnn.parameters()]), expected)
    assert packed, "nothing went through save_for_backward"
    with torch.autograd.graph.save_on_cpu():
        output, _ = rnn(x)
    assert bits(torch.autograd.grad(output.sum(), [x, *rnn.parameters()]), expected)


def test_no_grad_inference_mode_and_detached_agree():
    rnn, x = fastrnn.LSTM(5, 7, num_layers=2), data()
    expected = rnn(x)
    assert expected[0].requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = rnn(x)
        assert bits(found, expected)
        assert not found[0].requires_grad
    frozen = copy.deepcopy(rnn).requires_grad_(False)
    assert not frozen(x.detach())[0].requires_grad
    assert bits(frozen(x.detach()), expected)


# Dropout.


@pytest.mark.parametrize("layout", ["time first", "batch first", "bidirectional", "packed", "three layers"])
@pytest.mark.parametrize("name", CLASSES)
def test_dropout_masks_are_torchs(name, layout, rule):
    options = {"num_layers": 3 if layout == "three layers" else 2, "dropout": 0.4}
    options |= {"batch_first": layout == "batch first", "bidirectional": layout in ("bidirectional", "packed")}

    def call(rnn, dtype, seed):
        x = data(dtype, seed)
        given = pack_padded_sequence(x, [6, 4, 4, 1]) if layout == "packed" else x
        torch.manual_seed(11)
        return with_gradients(rnn(given), [x, *rnn.parameters()])

    # A mask that differs in one element would be an error of tens of percent.
    against_torch(rule, lambda module: getattr(module, name)(5, 7, **options), call)


def test_dropout_can_be_changed_and_switched_off():
    rnn = fastrnn.GRU(5, 7, num_layers=2)
    x = data()
    plain = rnn(x)
    rnn.dropout = 0.9
    assert not bits(rnn(x), plain)
    assert bits(rnn.eval()(x), plain)
    rnn.train().dropout = 1.0
    dead = rnn(x)[0]
    rnn.dropout = 0
    assert bits(rnn(x), plain)
    with torch.no_grad():
        rnn.weight_ih_l1.zero_()
    assert dead.equal(rnn(x)[0])
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        fastrnn.GRU(5, 7, dropout=0.5)


# Sizes at the edge, and values at the edge.


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    ours, theirs = pair(kind, 5, 7, num_layers=2, bidirectional=True)
    for rnn in (ours, theirs):
        x = torch.randn(6, 0, 5, requires_grad=True)
        output, hidden = rnn(x)
        assert output.shape == (6, 0, 14)
        assert all(h.shape == (4, 0, 7) for h in flat(hidden))
        output.sum().backward()
        assert x.grad.shape == x.shape
        assert all((p.grad == 0).all() for p in rnn.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_is_torchs_error(kind):
    ours, theirs = pair(kind, 5, 7)
    texts = []
    for rnn in (ours, theirs):
        with pytest.raises(RuntimeError) as caught:
            rnn(torch.randn(0, 4, 5))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert "Expected sequence length to be larger than 0 in RNN" in texts[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_spread_as_in_torch(kind, dtype, value, isa):
    ours, theirs = (rnn.to(dtype) for rnn in pair(kind, 5, 19, bidirectional=True))
    x = data().detach().clone().to(dtype)
    x[3, 1, 2] = value
    results = [tensors_in(rnn(x)) for rnn in (ours, theirs)]
    for mine, torchs in zip(*results, strict=True):
        assert mine.isnan().equal(torchs.isnan())
        assert mine.isinf().equal(torchs.isinf())
        rounding = 0.02 if dtype == torch.bfloat16 else 0  # may decide the sign of so small a number
        decided = ~(mine.isinf() | mine.isnan() | (torchs.abs() < rounding))
        assert mine.sign()[decided].equal(torchs.sign()[decided])
    grads = []
    for rnn in (ours, theirs):
        given = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(rnn(given)[0].sum(), [given, *rnn.parameters()]))
    for mine, torchs in zip(*grads, strict=True):
        assert mine.isnan().equal(torchs.isnan())


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e30])
@pytest.mark.parametrize("name", CLASSES)
def test_saturation(name, scale, isa):
    """Gates far out on their asymptotes: exact limits, no NaN, as in torch."""
    ours, theirs = pair("RNN_TANH" if name == "RNN" else name, 5, 19)
    x = data().detach() * scale
    for mine, torchs in zip(tensors_in(ours(x)), tensors_in(theirs(x)), strict=True):
        assert torch.isfinite(mine).all()
        assert (mine - torchs).norm() <= 1e-6 * torchs.norm()


# Autocast.


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hidden", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", SIXTEEN, ids=dtype_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("kind", "projection"), [*((kind, 0) for kind in KINDS), ("LSTM", 3)])
def test_autocast_dtypes_are_torchs(kind, projection, dtype, low, hidden, packed):
    options = {"proj_size": projection} if projection else {}
    ours, theirs = pair(kind, 5, 7, num_layers=2, **options)
    found = []
    for rnn in (theirs, ours):
        x = data(dtype).detach()
        if packed:
            x = pack_padded_sequence(x, [6, 4, 4, 1])
        hx = None
        if hidden is not None:
            hx = torch.zeros(2, 4, projection or 7, dtype=hidden)
            hx = (hx, torch.zeros(2, 4, 7, dtype=hidden)) if kind == "LSTM" else hx
        try:
            with warnings.catch_warnings(), torch.autocast("cpu", dtype=low):
                warnings.simplefilter("ignore")
                results = tensors_in(rnn(x, hx))
        except RuntimeError as error:
            found.append(str(error))
            continue
        found.append([t.dtype for t in results])
    if isinstance(found[0], str):
        return  # torch has no result here; ours may have one
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains(kind, rule):
    """Gradients in the parameters' dtype, errors of 16-bit size, backward inside or outside the region."""
    for inside in (True, False):

        def call(rnn, dtype, seed, inside=inside):
            x = data(dtype, seed)
            wanted = [x, *rnn.parameters()]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float64):
                output, _ = rnn(x)
                loss = (output.to(dtype) * normal(*output.shape, dtype=dtype, seed=3)).sum()
                if inside:
                    grads = torch.autograd.grad(loss, wanted)
            if not inside:
                grads = torch.autograd.grad(loss, wanted)
            assert all(g.dtype == w.dtype for g, w in zip(grads, wanted, strict=True))
            # judged as what they are: values that went through bfloat16
            return {str(i): g.to(torch.bfloat16 if dtype != torch.float64 else dtype) for i, g in enumerate(grads)}

        def draw(n, call=call):
            results = []
            for module, dtype in ((fastrnn, torch.float32), (nn, torch.float32), (nn, torch.float64)):
                torch.manual_seed(n)
                rnn = build(kind, 5, 7, module=module).to(dtype)
                results.append(call(rnn, dtype, 1000 * n))
            return results

        if kind != "RNN_RELU":  # its derivative is decided by luck in 16 bits
            rule.check(draw, torch.bfloat16, f"{kind} inside={inside}")


def test_autocast_off_inside_changes_nothing():
    rnn, x = fastrnn.GRU(5, 7), data()
    expected = rnn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert bits(rnn(x), expected)


# Other devices, other tensors: torch's implementation.


def test_weights_in_a_lazy_order_of_construction():
    """flatten_parameters can be called at any time, as sheeprl and others do every step."""
    rnn, x = fastrnn.LSTM(5, 7), data()
    expected = rnn(x)
    assert rnn.flatten_parameters() is None
    assert bits(rnn(x), expected)


def test_sparse_or_integer_input_is_torchs_business():
    ours, theirs = pair("GRU", 5, 7)
    for x in (torch.ones(6, 4, 5, dtype=torch.int32), torch.ones(6, 4, 5).to_sparse()):
        texts = []
        for rnn in (ours, theirs):
            with pytest.raises(Exception) as caught:  # noqa: B017, PT011  (whatever torch raises)
                rnn(x)
            texts.append((type(caught.value), str(caught.value)))
        assert texts[0] == texts[1]
