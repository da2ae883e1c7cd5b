"""Calls past torch's dispatcher where gradients are wanted (fastrnn/direct.py, autograd.py): the operators' bits, and
nothing that is not plainly right.
"""

import contextlib
import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import fastrnn._C as _C
import pytest
import torch
from conftest import DTYPES, KINDS, dtype_name, equal, normal, shared_out, tensors_in
from test_direct import CELLS, Dispatches, H, I, arguments, dual_level, long_way, make, spy_on
from test_direct_hazards import keeps_no_reference
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import direct

pytestmark = pytest.mark.skipif(not direct.AVAILABLE, reason="this torch has no C exchange API of DLPack")
COMPUTE = [torch.float32, torch.float64]
FORWARD, BACKWARD = "recorded", "backward"


@pytest.fixture
def served(monkeypatch):
    """Which of the two functions have served a call since, and which have not ("no ...")."""
    found = []
    spy_on(monkeypatch, (FORWARD, BACKWARD), lambda name, has: found.append(name if has else f"no {name}"))
    return found


def step(module, x, hx, incoming="dense", wanted=lambda name: True, of=lambda outs: outs):
    """Results, and the gradients of everything that is wanted, by name; incoming: how their gradients are laid out."""
    x = x.detach().requires_grad_(wanted("input"))
    states = [t.detach().requires_grad_(wanted("state")) for t in tensors_in(() if hx is None else hx)]
    given = None if hx is None else tuple(states) if isinstance(hx, tuple) else states[0]
    for name, p in module.named_parameters():
        p.requires_grad_(wanted(name))
    outs = of(tensors_in(module(x, given)))
    leaves = {"input": x, **{f"state {i}": t for i, t in enumerate(states)}, **dict(module.named_parameters())}
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    if incoming == "expanded":  # as of sum()
        grads = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outs]
    else:
        grads = [normal(*o.shape, dtype=o.dtype, seed=40 + i) for i, o in enumerate(outs)]
        if incoming == "strided":
            grads = [torch.stack([g, g + 1], -1)[..., 0] for g in grads]
    found = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
    return {f"result {i}": o.detach() for i, o in enumerate(outs)} | dict(zip(leaves, found))


def both(module, x, hx, served, expected=(FORWARD, BACKWARD), **options):
    with long_way():
        operators = step(module, x, hx, **options)
    served.clear()
    found = step(module, x, hx, **options)
    assert served == list(expected)
    assert found.keys() == operators.keys()
    for name, value in operators.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert found[name].equal(value) and found[name].dtype == value.dtype, name
            assert found[name].stride() == value.stride(), name
    return found


LAYERS = [
    {},
    {"bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True},
    {"proj_size": 4, "bidirectional": True},
    {"proj_size": 3, "batch_first": True, "bias": False},
    {"num_layers": 2, "bias": False},
    {"num_layers": 4, "bidirectional": True, "batch_first": True},
    {"proj_size": 3, "num_layers": 3, "batch_first": True},
]


@pytest.mark.parametrize("dtype", COMPUTE, ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_operators(kind, dtype, served):
    for options in LAYERS:
        if "proj_size" in options and kind != "LSTM":
            continue
        module = make(kind, dtype, **options)
        for rows, steps, given in itertools.product((1, 5), (1, 11), (True, False)):
            x, hx = arguments(module, rows, dtype, steps=steps)
            for incoming in ("dense", "expanded", "strided"):
                both(module, x, hx if given else None, served, incoming=incoming)


@pytest.mark.parametrize("dtype", COMPUTE, ids=dtype_name)
@pytest.mark.parametrize("name", CELLS)
def test_the_bits_of_the_operators_in_cells(name, dtype, served):
    for bias, rows, given in itertools.product((True, False), (1, 4, 6), (True, False)):
        module = make(name, dtype, bias=bias)
        x, hx = arguments(module, rows, dtype)
        for incoming in ("dense", "expanded", "strided"):
            both(module, x, hx if given else None, served, incoming=incoming)


@pytest.mark.parametrize("split", ["serial", "batch", "hidden", "wavefront", "ahead"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_sharing_out(kind, split, served):
    for options in ({"bidirectional": True}, {"num_layers": 5}):
        module = make(kind, **options)
        x, hx = arguments(module, 3, steps=40)
        expected = step(module, x, hx)
        with shared_out(split, 3):
            equal(list(both(module, x, hx, served).values()), list(expected.values()))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
def test_what_is_wanted(name, served):
    """Frozen weights, inputs without gradients, and results that nobody uses."""
    module = make(name)
    x, hx = arguments(module, steps=3)
    names = ["input", "state", *(n for n, _ in module.named_parameters())]
    for wanted in [{n} for n in names] + [set(names) - {n} for n in names]:
        both(module, x, hx, served, wanted=wanted.__contains__)
    if name == "GRU":  # of a stack: what lies below everything that is wanted is left out
        deep = make(name, num_layers=4)
        names = ["input", "state", *(n for n, _ in deep.named_parameters())]
        for first in names:  # and all behind it
            served_by = [FORWARD, BACKWARD] if names.index(first) < 6 else ["no recorded"]
            both(deep, *arguments(deep, steps=3), served, served_by, wanted=names[names.index(first) :].__contains__)
        for k in range(4):  # back only through the layers that lead there
            mine = {f"weight_hh_l{k}", "bias_ih_l0"}
            both(deep, *arguments(deep, steps=3), served, wanted=mine.__contains__)
            output = deep(*arguments(deep, steps=3))[0]
            served.clear()
            torch.autograd.grad(output.sum(), getattr(deep, f"weight_hh_l{k}"))
            assert served == [BACKWARD]
    for k in range(len(tensors_in(module(x, hx)))):
        both(module, x, hx, served, of=lambda outs, k=k: outs[k : k + 1])
    served.clear()
    for p in module.parameters():
        p.requires_grad_(False)
    found = module(x, hx)  # nothing to record: computed without a tape
    assert served == ["no recorded"] and not any(t.requires_grad for t in tensors_in(found))
    with torch.no_grad():
        equal(found, module(x, hx))


def test_memory_that_is_laid_out_otherwise(served):
    for name in ("GRU", "LSTMCell"):
        module = make(name)
        x, hx = arguments(module, steps=2)
        wide = normal(*x.shape[:-1], 2 * I)
        both(module, wide[..., 3 : 3 + I], hx, served)  # rows apart
        both(module, x[..., :1, :].expand(x.shape), hx, served)
        if name == "GRU":
            both(module, normal(5, 6, I).transpose(0, 1), hx, served)
            both(module, normal(12, 5, I)[::2], hx, served)
        both(module, wide[..., ::2], hx, served, ["no recorded"])  # the operator copies it


def test_sizes_of_users(served):
    """With gradients of weights in memory that is kept for later calls, which is given back."""
    for name, width, rows in (("LSTM", 256, 4), ("GRU", 18, 1), ("RNN", 25, 3), ("GRUCell", 519, 2)):
        module = getattr(fastrnn, name)(width, width)
        both(module, *arguments(module, rows, steps=3), served)
    fastrnn.release_workspace()
    module = fastrnn.GRUCell(200, 200)
    module(*arguments(module, 4)).sum().backward()
    before = _C.workspace_bytes()
    kept = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    assert _C.workspace_bytes() >= before + 2 * 4 * 600 * 200
    module(*arguments(module, 4)).sum().backward()
    equal(kept, [p.grad for p in module.parameters()])


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_what_goes_by_the_operators(name, served):
    module = make(name)
    x, hx = arguments(module, steps=4)
    both(module, *arguments(module, steps=4, unbatched=True), served, ["no recorded"])
    both(make(name, frozen=True), x, hx, served, ["no recorded"])
    for dtype in set(DTYPES) - set(COMPUTE):
        low = make(name, dtype)
        both(low, *arguments(low, dtype=dtype, steps=4), served, ["no recorded"])
    if name == "LSTM":
        deep = make(name, num_layers=9)
        both(deep, *arguments(deep, steps=4), served, ["no recorded"])
        drops = make(name, num_layers=2, dropout=0.5)
        both(drops, *arguments(drops, steps=4), served)
        served.clear()
        drops.train()(*arguments(drops, steps=4))
        assert served == ["no recorded"]
        long = fastrnn.LSTM(I, H, recompute=True)
        both(long, *arguments(long, steps=4), served, [])
    else:
        both(module, x[:0], hx[:0], served, ["no recorded"])
    with fastrnn.probe(module) as probe:
        both(module, x, hx, served, [])
    assert probe.layers


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_whatever_watches_sees_the_operator(name, served):
    module = make(name)
    x, hx = arguments(module)
    plain = step(module, x, hx)
    for mode in (Dispatches(), dual_level(), torch.autocast("cpu", torch.bfloat16)):
        served.clear()
        with mode:
            step(module, x, hx)
        assert "recorded" not in served and "backward" not in served
        if isinstance(mode, Dispatches):
            assert any("fastrnn." in n for n in mode.names)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(module, x, hx)
    assert "fastrnn::layer_backward" in {e.name for e in found.events()}
    # where the mode comes for backward alone, and the other way round
    output = tensors_in(module(x, hx))[0]
    with Dispatches() as mode:
        output.sum().backward()
    assert "fastrnn.layer_backward.default" in mode.names
    with Dispatches():
        output = tensors_in(module(x, hx))[0]
    output.sum().backward()
    equal(list(step(module, x, hx).values()), list(plain.values()))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell", "GRU", "LSTM"])
def test_gradients_of_gradients(name, served):
    for options in ({},) if "Cell" in name else ({}, {"batch_first": True, "bidirectional": True}):
        module = getattr(fastrnn, name)(2, 3, dtype=torch.float64, **options)
        x, hx = arguments(module, 2, torch.float64, steps=3)
        leaves = [x, *tensors_in(hx), *module.parameters()]
        for t in leaves:
            t.requires_grad_()

        def call(*_, module=module, x=x, hx=hx):
            return tensors_in(module(x, hx))

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    assert {FORWARD, BACKWARD} <= set(served)


def test_a_graph_is_used_again_or_freed(served):
    module = make("LSTM")
    x, hx = arguments(module, steps=4)
    output, _ = module(x, hx)
    first = torch.autograd.grad(output.sum(), list(module.parameters()), retain_graph=True)
    with torch.no_grad():
        for _ in range(5):
            module(x, hx)
    equal(first, torch.autograd.grad(output.sum(), list(module.parameters())))
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    output, _ = module(x, hx)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    cell = make("GRUCell")
    h = cell(*arguments(cell))
    before = torch.autograd.grad(h.sum(), cell.weight_hh, retain_graph=True)
    h.mul_(1)  # the caller's own
    equal(before, torch.autograd.grad(h.sum(), cell.weight_hh))


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_what_hooks_make_of_what_is_saved(name, served):
    """The same values elsewhere are as good; what does not fit is an error of the operator's."""
    module = make(name)
    x, hx = arguments(module, steps=4)
    x.requires_grad_()
    expected = step(module, x, hx)
    served.clear()
    with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        equal(list(step(module, x, hx).values()), list(expected.values()))
    assert served == []  # the operators' way: see test_checkpointing
    # what is saved: the tape, nothing, x, one or two states, weights
    wrong = {
        0: [lambda t: t[..., :-1], lambda t: t.double(), lambda t: t[:, :-1]],
        2: [lambda t: t[..., :-1], lambda t: t[0]],
        3: [lambda t: t[..., :-1], lambda t: t.double()],
        5: [lambda t: t[:-1], lambda t: t.t(), lambda t: t.double()],
        6: [lambda t: t[:-1], lambda t: t[:, :-1]],
        7: [lambda t: t[:-1], lambda t: t[None]],
    }
    for place, changes in wrong.items():
        for change in [lambda t: t.clone(), *changes]:
            output = tensors_in(module(x, hx))[0]
            output.grad_fn._raw_saved_tensors[place].register_hooks(lambda t: t.detach(), change)
            served.clear()
            if change in changes:
                with pytest.raises(RuntimeError):
                    output.sum().backward()
                assert served == ["no backward"], place
            else:
                output.sum().backward()
                assert served == [BACKWARD]


@pytest.mark.parametrize("name", ["GRU", "LSTMCell", "two layers"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(name, reentrant, served):
    """Also where one pass is watched and the other is not: both have to save the same."""
    module = make("GRU", num_layers=2, batch_first=True) if name == "two layers" else make(name)
    x, hx = arguments(module, steps=4)

    def call(forward=contextlib.nullcontext, backward=contextlib.nullcontext, checkpointed=True):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        with forward():
            found = checkpoint(module, leaf, hx, use_reentrant=reentrant) if checkpointed else module(leaf, hx)
        with backward():
            tensors_in(found)[0].sum().backward()
        return [leaf.grad, *(p.grad for p in module.parameters())]

    def profiled():
        return profile(activities=[ProfilerActivity.CPU])

    expected = call(checkpointed=False)
    for watched in ({}, {"forward": profiled}, {"backward": profiled}, {"backward": Dispatches}):
        equal(call(**watched), expected)


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell", "LSTM", "two layers"])
def test_a_batch_of_gradients(name, served):
    """is_grads_batched, and Jacobians by it."""
    module = make("GRU", num_layers=2) if name == "two layers" else make(name)
    x, hx = arguments(module, steps=3)
    results, weights = tensors_in(module(x, hx)), list(module.parameters())
    for used in (results, results[:1], results[-1:]):
        vectors = [normal(3, *h.shape) for h in used]
        served.clear()
        found = torch.autograd.grad(used, weights, vectors, is_grads_batched=True, retain_graph=True)
        assert BACKWARD not in served
        each = [torch.autograd.grad(used, weights, v, retain_graph=True) for v in zip(*vectors)]
        for f, e in zip(found, zip(*each)):
            assert f.equal(torch.stack(e))

        found = torch.func.vmap(
            lambda *v, used=used: torch.autograd.grad(used, weights, v, retain_graph=True), randomness="error"
        )(*vectors)
        for f, e in zip(found, zip(*each)):
            assert f.equal(torch.stack(e))

    def first(x):
        return tensors_in(module(x, hx))[0].sum(-1)

    jacobians = [torch.autograd.functional.jacobian(first, x, vectorize=v) for v in (False, True)]
    torch.testing.assert_close(*jacobians)


def test_other_parameters(served):
    """functional_call, tied weights, and one tensor given twice."""
    module = make("GRUCell")
    x, hx = arguments(module)
    others = {n: (p * 2).detach().requires_grad_() for n, p in module.named_parameters()}
    h = torch.func.functional_call(module, others, (x, hx))
    found = torch.autograd.grad(h.sum(), list(others.values()))
    assert served == [FORWARD, BACKWARD]
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    equal(found, torch.autograd.grad(module(x, hx).sum(), list(module.parameters())))
    cell = fastrnn.LSTMCell(H, H)
    cell.weight_hh, cell.bias_hh = cell.weight_ih, cell.bias_ih
    z = normal(4, H).requires_grad_()
    served.clear()
    found = torch.autograd.grad(sum(t.sum() for t in cell(z, (z, z))), [z, *cell.parameters()])
    assert served == [FORWARD, BACKWARD]
    twin = nn.LSTMCell(H, H)
    twin.weight_ih, twin.bias_ih = twin.weight_hh, twin.bias_hh = cell.weight_ih, cell.bias_ih
    for f, e in zip(found, torch.autograd.grad(sum(t.sum() for t in twin(z, (z, z))), [z, *twin.parameters()])):
        torch.testing.assert_close(f, e)


def test_a_loop_over_cells_is_the_layer(served):
    """Step by step, with the gradient handed back from cell to cell."""
    cell, layer = fastrnn.GRUCell(I, H, dtype=torch.float64), fastrnn.GRU(I, H, dtype=torch.float64)
    layer.load_state_dict({f"{n}_l0": p for n, p in cell.state_dict().items()})
    x, h = normal(30, 3, I, dtype=torch.float64), normal(3, H, dtype=torch.float64)
    outs = []
    for row in x:
        h = cell(row, h)
        outs.append(h)
    torch.stack(outs).square().sum().backward()
    assert served == 30 * [FORWARD] + 30 * [BACKWARD]
    layer(x, normal(3, H, dtype=torch.float64)[None])[0].square().sum().backward()
    for n, p in cell.named_parameters():
        torch.testing.assert_close(p.grad, getattr(layer, f"{n}_l0").grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_no_reference_is_lost_or_kept(name):
    module = make(name)
    x, hx = arguments(module, steps=3)
    x.requires_grad_()
    watched = [x, *tensors_in(hx), *module.parameters(), module.__dict__, None, True, False]

    def calls(n):
        for _ in range(n):
            module.zero_grad()
            x.grad = None
            tensors_in(module(x, hx))[0].sum().backward()
            module(x, hx)  # never gone back through
        module.zero_grad()
        x.grad = None

    keeps_no_reference(calls, watched)


def test_arguments_of_the_functions():
    with pytest.raises(TypeError, match="recorded: expected 5 arguments, got 1"):
        _C.recorded("gru")
    with pytest.raises(TypeError, match="backward: expected 9 arguments, got 0"):
        _C.backward()
    module = make("GRU")
    x, h = arguments(module, steps=3)
    results, tape, between, precision, tensors = _C.recorded("gru", module.__dict__, True, x, h)
    assert between is None
    needs, grads = (False, True, True, False, *[True] * 4), tuple(torch.ones_like(r) for r in results)
    good = ["gru", 1, True, False, False, precision, (tape, None, *tensors), needs, grads]
    found = _C.backward(*good)
    assert found[0] is None
    assert [f is not None and f.shape for f in found[1:]] == [t is not None and t.shape for t in tensors]

    def replaced(values, place, value):
        return (*values[:place], value, *values[place + 1 :])

    odd = [None, 3, "x", x.int(), x[0], x.double(), x[..., :1], x.to("meta"), x[:0], torch.tensor(1.0), x.to_sparse()]
    bad = {
        0: ["lstm", "rnn", None, 3],
        1: [0, 2, 4, -1, 2**70, None, "x"],
        2: [False],
        3: [True],
        4: [True],  # h is of other rows then
        5: [-1, 3, None, 2**70, 1.5],
        6: [None, (), [], (tape,), (tape, None), (tape, None, *tensors[:3]), (tape, None, *tensors, tape)]
        + [replaced(good[6], i, o) for i in (0, *range(2, 9)) for o in odd if i not in (3, 4) or o is not None],
        7: [None, (), [], needs[:-2], "x"],
        8: [None, (), grads[:1], (*grads, None)] + [replaced(grads, i, o) for i in (0, 1) for o in odd[1:]],
    }
    for place, values in bad.items():
        for value in values:
            assert _C.backward(*good[:place], value, *good[place + 1 :]) is None, (place, value)

    module = make("GRU", num_layers=3)
    x, h = arguments(module, steps=3)
    results, tape, between, precision, tensors = _C.recorded("gru", module.__dict__, True, x, h)
    needs, grads = (*[True] * 2, False, *[True] * 12), tuple(torch.ones_like(r) for r in results)
    good = ["gru", 3, True, False, False, precision, (tape, between, *tensors), needs, grads]
    found = _C.backward(*good)
    assert [f is not None and f.shape for f in found] == [t is not None and t.shape for t in tensors]
    for other in (None, between[:1], between[..., :-1], between.double(), between[:, :, :1], tape, x):
        assert _C.backward(*good[:6], (tape, other, *tensors), *good[7:]) is None
    for count in (1, 2, 4, 6, 12):
        assert _C.backward("gru", count, *good[2:]) is None


def test_python_threads():
    """Each trains a module of its own, and all one more, whose graph each has to itself."""
    shared = fastrnn.LSTM(64, 64)
    x, hx = arguments(shared, 4, steps=3)
    expected = torch.autograd.grad(shared(x, hx)[0].sum(), list(shared.parameters()))

    def work(_):
        own = fastrnn.GRUCell(32, 32)
        z = normal(4, 32)
        for _ in range(100):
            own.zero_grad()
            own(z, z).sum().backward()
            equal(torch.autograd.grad(shared(x, hx)[0].sum(), list(shared.parameters())), expected)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_child():
    cell = fastrnn.GRUCell(200, 200)
    x, h = arguments(cell, 6)

    def call():
        return [g.numpy().tobytes() for g in torch.autograd.grad(cell(x, h).sum(), list(cell.parameters()))]

    expected = call()
    child = os.fork()
    if not child:
        signal.alarm(60)  # rather ended than hanging
        os._exit(0 if call() == expected else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert call() == expected
