"""Numbers at the edge, by AMX's tiles: infinities, NaN, numbers next to the largest, tiny ones; as cases_on_amx.py.

What is not finite has to be where avx512_bf16's kernels, whose products are float32's own, put it; what is tiny, to be
as right as by them, or as torch.nn's.
"""

import copy
import math

import amx
import fastrnn._C as _C
import pytest
import torch
from conftest import KINDS, normal, pair

import fastrnn

INF, NAN = math.inf, math.nan


def edge(kind, T=9, B=17, I=33, H=37, **changes):
    """x, h0 and dy of a layer, and modules of both libraries: (data, ours, theirs)."""
    torch.manual_seed(0)
    ours, theirs = pair(kind, I, H, **changes)
    return [torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(T, B, H)], ours, theirs


def results(module, data, dtype=torch.float32):
    """Outputs and every gradient, by name."""
    x, h0, dy = (t.to(dtype) for t in data)
    x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
    output, _ = module(x, (h0, torch.zeros_like(h0)) if module.mode == "LSTM" else h0)
    wanted = {"dx": x, "dh0": h0, **dict(module.named_parameters())}
    grads = torch.autograd.grad(output, list(wanted.values()), dy)
    return {"output": output.detach(), **dict(zip(wanted, grads))}


def beneath(module, data):
    _C.set_isa(amx.BENEATH)
    found = results(module, data)
    _C.set_isa("")
    return found


def classes(t):
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), 0.0))


PLACES = ["x", "h0", "dy", "weight_ih_l0", "weight_hh_l0"]


@torch.no_grad()
def put(value, place, data, module):
    if place == "dy":  # of a unit that relu lets through
        data[2][4, 3, module(data[0])[0][4, 3].argmax()] = value
    elif place in ("x", "h0"):
        data[PLACES.index(place)][0 if place == "h0" else 4, 3, 5] = value
    else:
        getattr(module, place)[7, 5] = value


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite(kind, place, value):
    """Infinite and NaN in the very places where torch.nn has them, and all the rest as good as ever."""
    data, ours, theirs = edge(kind)
    put(value, place, data, theirs)
    ours.load_state_dict(theirs.state_dict())
    mine, torchs = results(ours, data), results(theirs, data)
    fma, truth = beneath(ours, data), truth_of(theirs, data)
    assert any(not t.isfinite().all() for t in truth.values()), "the test is wrong"
    for name, want in truth.items():
        assert classes(mine[name]).equal(classes(fma[name])), name
        # A GRU's gates that an infinite gradient meets: inf * 0 or none at all, by how the factors are arranged.
        if (kind, place, name) != ("GRU", "dy", "dx"):
            assert classes(mine[name]).equal(classes(torchs[name])), name
        finite = want.isfinite() & mine[name].isfinite() & torchs[name].isfinite()
        a, b, truly = (t[finite].double() for t in (mine[name], torchs[name], want))
        assert (a - truly).norm() <= 1.5 * (b - truly).norm() + 2e-7 * truly.norm(), name


@pytest.mark.parametrize("value", [3e38, 3.4e38, -3.4e38])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["RNN_TANH", "LSTM"])
def test_next_to_the_largest_number(kind, place, value):
    """As finite as float32's own, and as right. A sum may overflow a little sooner, when it is within a hundredth of
    float32's largest: where a piece is rounded up. (Not GRU, where h0 is handed on.)"""
    data, ours, theirs = edge(kind)
    put(value, place, data, theirs)
    ours.load_state_dict(theirs.state_dict())
    mine, torchs, truth = results(ours, data), results(theirs, data), truth_of(theirs, data)
    for name, want in truth.items():
        close_to_overflow = (want.abs() > 3.3e38) & (want.abs() < 3.5e38)
        assert (classes(mine[name]).eq(classes(torchs[name])) | close_to_overflow).all(), name
        finite = mine[name].isfinite() & torchs[name].isfinite()
        a, b, truly = (t[finite].double() for t in (mine[name], torchs[name], want))
        assert (a - truly).norm() <= 1.5 * (b - truly).norm() + 2e-7 * truly.norm(), name


def test_inputs_next_to_the_largest_number():
    """All of them, with weights that make something of them: pre-activations of about one."""
    data, ours, theirs = edge("RNN_TANH", bias=False)
    data[0] = torch.where(data[0] > 0, 3.4e38, -3.4e38)
    with torch.no_grad():
        theirs.weight_ih_l0.zero_()[:, 0] = torch.linspace(2e-3, 3e-3, 37)  # only its column reaches the output:
        data[0][..., 0] = normal(9, 17, seed=4)
    ours.load_state_dict(theirs.state_dict())
    judge(ours, theirs, data, names=["output", "dx", "dh0", "weight_hh_l0"])


def truth_of(module, data):
    return results(copy.deepcopy(module).double(), data, torch.float64)


def judge(ours, theirs, data, names=None):
    """The rule's bound, tensor by tensor."""
    mine, torchs, truth = results(ours, data), results(theirs, data), truth_of(theirs, data)
    for name in names or truth:
        want = truth[name]
        assert want.any() and want.isfinite().all(), name
        err, err_torch = (distance_from(t[name], want) for t in (mine, torchs))
        assert err <= 1.5 * err_torch + 2e-7, f"{name}: error {err:.3e}, torch's {err_torch:.3e}"


def distance_from(t, want):
    return ((t.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("size", [1e-20, 1e-24, 1e-26, 1e-30, 1e-35, 1e-38, 1e-40])
@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU"])
def test_tiny_inputs(kind, size):
    """From zero states without biases: outputs are as tiny, and as right as float32's own, down to denormal numbers."""
    data, ours, theirs = edge(kind, bias=False)
    data[0], data[1] = data[0] * size, data[1] * 0
    judge(ours, theirs, data, names=["output", "dx", "dh0"])


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-34, 1e-36, 1e-38, 1e-40])
@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU"])
def test_gradients_of_weights_from_tiny_inputs(kind, size):
    data, ours, theirs = edge(kind, bias=False)
    data[0], data[1] = data[0] * size, data[1] * 0
    judge(ours, theirs, data, names=["weight_ih_l0", "weight_hh_l0"])


@pytest.mark.parametrize(("input", "incoming"), [(1e-12, 1e-23), (1e-18, 1e-18), (1e-23, 1e-12), (1, 1e-35)])
def test_gradients_of_weights_that_are_tiny_products(input, incoming):
    data, ours, theirs = edge("LSTM")
    data[0], data[2] = data[0] * input, data[2] * incoming
    judge(ours, theirs, data)


@pytest.mark.parametrize("size", [1e-20, 1e-24, 1e-30, 1e-36])
def test_gradients_of_a_projection_of_tiny_states(size):
    torch.manual_seed(0)
    ours, theirs = pair("LSTM", 33, 37, bias=False, proj_size=19)
    data = [normal(9, 17, 33, seed=1) * size, None, normal(9, 17, 19, seed=2)]

    def call(module, dtype):
        output, _ = module(data[0].to(dtype))
        names, parameters = zip(*module.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(output, parameters, data[2].to(dtype)), strict=True))

    mine, torchs = call(ours, torch.float32), call(theirs, torch.float32)
    for name, want in call(copy.deepcopy(theirs).double(), torch.float64).items():
        err, err_torch = (distance_from(t[name], want) for t in (mine, torchs))
        assert err <= 1.5 * err_torch + 2e-7, f"{name}: error {err:.3e}, torch's {err_torch:.3e}"


@pytest.mark.parametrize("size", [1e-20, 1e-24, 1e-28])
def test_a_tiny_feature_among_ordinary_ones(size):
    """Its own column of the gradient is as right as the others."""
    data, ours, theirs = edge("LSTM")
    data[0][..., 7] *= size
    mine, torchs, truth = (
        found["weight_ih_l0"][:, 7] for found in (results(ours, data), results(theirs, data), truth_of(theirs, data))
    )
    assert distance_from(mine, truth) <= 1.5 * distance_from(torchs, truth) + 2e-7


def test_small_gradients_meet_huge_weights():
    """A row that is brought near to one before it is multiplied does not overflow."""
    data, ours, theirs = edge("RNN_TANH")
    with torch.no_grad():
        theirs.weight_ih_l0.uniform_(0, 3e38)
    ours.load_state_dict(theirs.state_dict())
    data[0], data[2] = data[0] * 1e-38, data[2] * 1e-30
    judge(ours, theirs, data, names=["output", "dx", "dh0"])


def test_small_gradients_meet_huge_inputs():
    data, ours, theirs = edge("RNN_TANH")
    with torch.no_grad():
        theirs.weight_ih_l0[:, 5] = 0
    ours.load_state_dict(theirs.state_dict())
    data[0][..., 5], data[2] = 3e38, data[2] * 1e-30
    judge(ours, theirs, data)


@pytest.mark.parametrize(("x", "weight"), [(1.003e30, 1.003e12), (1.003e12, -1.003e30), (3.003e38, 3.006e38)])
def test_a_product_that_overflows_is_infinite(x, weight):
    """And not NaN, where pieces of both signs overflow: tanh of it is one."""
    data, ours, theirs = edge("RNN_TANH")
    with torch.no_grad():
        theirs.weight_ih_l0[7, 5] = weight
        data[0][..., 5] = x * torch.linspace(1, 1.01, 17)
    ours.load_state_dict(theirs.state_dict())
    assert theirs(data[0])[0][..., 7].eq(math.copysign(1, weight)).all()
    assert ours(data[0])[0][..., 7].eq(math.copysign(1, weight)).all()


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU"])
def test_tiny_rows_among_ordinary_ones(kind):
    """Every row by itself is as right as torch's, in outputs and in the gradients of inputs and states."""
    data, ours, theirs = edge(kind, bias=False)
    scale = torch.ones(17)
    scale[[2, 5, 11, 12]] = torch.tensor([1e-40, 1e-30, 0, 1e-24])
    for t in data:
        t *= scale[:, None]
    mine, torchs, truth = results(ours, data), results(theirs, data), truth_of(theirs, data)
    for name in ("output", "dx", "dh0"):
        for row in range(17):
            want = truth[name][:, row]
            err, err_torch = ((t[name][:, row].double() - want).norm() for t in (mine, torchs))
            assert want.any() == (row != 11) and err <= 1.5 * err_torch + 2e-7 * want.norm(), (name, row)
    judge(ours, theirs, data)


def test_a_gradient_that_vanishes():
    """Over 200 steps, to 1e-35 and less: to the end as right as by other kernels, relative to what is left of it."""
    torch.manual_seed(0)
    rnn = fastrnn.RNN(33, 37)
    with torch.no_grad():
        torch.nn.init.orthogonal_(rnn.weight_hh_l0).mul_(0.7)
        rnn.weight_ih_l0.mul_(0.3)
    data = [torch.randn(200, 9, 33), torch.randn(1, 9, 37), torch.zeros(200, 9, 37)]
    data[2][-1] = 1
    mine, fma = results(rnn, data), beneath(rnn, data)
    truth = truth_of(rnn, data)
    assert 1e-38 < truth["dh0"].norm() < 1e-33
    for name in ("dh0", "dx"):
        for step in range(0, len(truth[name]), 20):
            want = truth[name][step]
            err, err_fma = distance_from(mine[name][step], want), distance_from(fma[name][step], want)
            assert err <= 1.5 * err_fma + 2e-7, (name, step, err, err_fma)


def test_rows_of_zeros():
    data, ours, theirs = edge("LSTM", bias=False)
    data[0][:, 3:7], data[1][:, 3:7] = 0, 0
    assert not results(ours, data)["output"][:, 3:7].any()
    judge(ours, theirs, data)
