"""Calls past torch's dispatcher (fastrnn/direct.py): the operators' bits, and nothing that is not plainly right."""

import contextlib
import copy
import itertools
import math
import pickle

import fastrnn._C as _C
import pytest
import torch
from conftest import DTYPES, KINDS, build, dtype_name, equal, normal, shared_out, tensors_in
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import direct

pytestmark = pytest.mark.skipif(not direct.AVAILABLE, reason="this torch has no C exchange API of DLPack")

I, H = 7, 19
CELLS = ["RNNCell", "RNNCell relu", "LSTMCell", "GRUCell"]


def spy_on(monkeypatch, names, note):
    """note(name, whether it has served the call) for each call of these functions of _C from now on."""
    for name in names:
        inner = getattr(_C, name)

        def spy(*arguments, _inner=inner, _name=name):
            result = _inner(*arguments)
            note(_name, result is not None and result is not False)
            return result

        monkeypatch.setattr(_C, name, spy)


@pytest.fixture
def served(monkeypatch):
    """Whether each call since was served past the dispatcher."""
    found = []
    spy_on(monkeypatch, ("forward", "step_onto"), lambda name, has_served: found.append(has_served))
    return found


@contextlib.contextmanager
def long_way():
    """Calls go by the operators in here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, declined in (("forward", None), ("step_onto", False), ("recorded", None), ("backward", None)):
            patch.setattr(_C, name, lambda *a, _declined=declined: _declined)
        yield


def make(name, dtype=torch.float32, frozen=False, **options):
    kind, *rest = name.split()
    if kind.endswith("Cell"):
        extra = {"nonlinearity": "relu"} if rest else {}
        module = getattr(fastrnn, kind)(I, H, dtype=dtype, **extra, **options).eval()
    else:
        module = build(name, I, H, dtype=dtype, **options).eval()
    return module.freeze() if frozen else module


def arguments(module, rows=5, dtype=torch.float32, unbatched=False, seed=3, steps=1):
    """Input and state, of a module for so many steps."""
    batch = () if unbatched else (rows,)
    lead = () if isinstance(module, nn.RNNCellBase) else (module.num_layers * (2 if module.bidirectional else 1),)
    x = normal(*((steps,) if lead else ()), *batch, module.input_size, dtype=dtype, seed=seed)
    if lead and module.batch_first and not unbatched:
        x = x.transpose(0, 1).contiguous()
    widths = [getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size]
    lstm = isinstance(module, (nn.LSTM, nn.LSTMCell))
    hx = tuple(normal(*lead, *batch, w, dtype=dtype, seed=seed + 1 + i) for i, w in enumerate(widths[: 1 + lstm]))
    return x, hx if lstm else hx[0]


def clones(hx):
    return tuple(t.clone() for t in hx) if isinstance(hx, tuple) else hx.clone()


def alike(found, expected):
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        assert a.is_contiguous() and not a.requires_grad and a.is_inference() == b.is_inference()


def both(module, x, hx, served, expected=True):
    """forward's results, equal to those of the operators."""
    with torch.no_grad():
        with long_way():
            operators = module(x, hx)
        served.clear()
        found = module(x, hx)
    assert served == [expected]
    alike(found, operators)
    return found


LAYERS = [
    {},
    {"num_layers": 3, "batch_first": True},
    {"num_layers": 2, "bias": False},
    {"proj_size": 4, "num_layers": 2},
    {"num_layers": 4, "bidirectional": True, "batch_first": True},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_operators(kind, frozen, dtype, isa, served):
    for options in LAYERS:
        if "proj_size" in options and kind != "LSTM":
            continue
        module = make(kind, dtype, frozen, **options)
        for rows, steps, given in itertools.product((1, 4, 5, 9), (1, 2, 11), (True, False)):
            x, hx = arguments(module, rows, dtype, steps=steps)
            first = [t.clone() for t in tensors_in(hx)]
            found = both(module, x, hx if given else None, served)
            equal(hx, first)  # nothing is written to what came in
            storages = {t.untyped_storage().data_ptr() for t in tensors_in(found)}
            assert len(storages) == len(tensors_in(found))  # each result has memory of its own
        for steps in (1, 7):
            both(module, *arguments(module, 1, dtype, unbatched=True, steps=steps), served)


@pytest.mark.parametrize("split", ["serial", "batch", "hidden", "wavefront", "ahead"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_sharing_out(kind, frozen, split, served):
    for options in ({"num_layers": 5}, {"num_layers": 3, "bidirectional": True}):
        module = make(kind, frozen=frozen, **options)
        x, hx = arguments(module, 3, steps=40)
        with torch.no_grad():
            expected = module(x, hx)
            with shared_out(split, 3):
                alike(both(module, x, hx, served), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", CELLS)
def test_the_bits_of_the_operators_in_cells(name, frozen, dtype, isa, served):
    for bias, rows in itertools.product((True, False), (1, 4, 6)):
        module = make(name, dtype, frozen, bias=bias)
        x, hx = arguments(module, rows, dtype)
        both(module, x, hx, served)
        both(module, x, None, served)
        both(module, *arguments(module, dtype=dtype, unbatched=True), served)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", [*KINDS, *CELLS])
def test_step_onto_states(name, frozen, dtype, isa, served):
    """The bits of the operator, with every kind of reset, also where a graph is recorded."""
    module = make(name, dtype, frozen, **({} if name in CELLS else {"num_layers": 2}))
    for rows, unbatched in ((1, False), (3, False), (6, False), (1, True)):
        x, hx = arguments(module, rows, dtype, unbatched)
        x = x if name in CELLS else x.squeeze(0)
        reset = torch.arange(rows) % 2 == 0
        reset = reset[0] if unbatched else reset
        every = arguments(module, rows, dtype, unbatched, seed=20)[1]
        one = arguments(module, 1, dtype, seed=21)[1]
        for mask, start in ((None, None), (reset, None), (reset, every), (reset, every if unbatched else one)):
            expected, found = clones(hx), clones(hx)
            with long_way():
                module.step(x, expected, reset=mask, reset_state=start)
            served.clear()
            with torch.set_grad_enabled(rows == 3):
                module.step(x, found, reset=mask, reset_state=start)
            assert served == [True]
            equal(found, expected)


def test_sizes_of_users(served):
    """Control loops, audio, and hidden units that fill no vector."""
    for name, width, rows in (("LSTM", 512, 8), ("GRU", 18, 1), ("RNN_TANH", 25, 3), ("GRUCell", 519, 2)):
        kind = {"RNN_TANH": "RNN"}.get(name, name)
        for frozen in (False, True):
            module = getattr(fastrnn, kind)(width, width).eval()
            both(module.freeze() if frozen else module, *arguments(module, rows), served)


def test_strided_inputs(served):
    for name in ("GRU", "LSTMCell"):
        module = make(name)
        x, hx = arguments(module)
        wide = normal(*x.shape[:-1], 2 * I)
        both(module, wide[..., 3 : 3 + I], hx, served)  # rows apart
        both(module, x[..., :1, :].expand(x.shape), hx, served)  # every row the same memory
        if name == "GRU":
            both(module, normal(5, 6, I).transpose(0, 1), hx, served)  # steps beside each other
            both(module, x.expand(6, -1, -1), hx, served)
            both(module, normal(12, 5, I)[::2], hx, served)
        both(module, wide[..., ::2], hx, served, False)  # the operator copies it
        if name == "GRU":
            turned = torch.stack([hx, hx], -1)[..., 0]
            both(module, x, turned, served, False)


def test_what_goes_by_the_operators(served):
    module = make("LSTM")
    x, hx = arguments(module, steps=4)
    both(make("GRU", num_layers=9), x, normal(9, 5, H), served, False)
    both(make("GRU"), x[:, :0], normal(1, 0, H), served, False)
    packed = pack_padded_sequence(x, torch.tensor([4, 3, 3, 1, 1]))
    both(module, packed, hx, served, False)
    with torch.no_grad():
        for extended in ({"reset": torch.zeros(4, 5, dtype=torch.bool)}, {"lengths": torch.tensor([4, 1, 2, 3, 4])}):
            served.clear()
            module(x, hx, **extended)
            assert not any(served)


def test_what_torch_refuses(served):
    """A projection of a cell that has none, and a dropout that is none."""
    module = make("GRU", bias=False)
    module.proj_size = 1
    module.weight_hh_l0, module.weight_hr_l0 = nn.Parameter(normal(3 * H, 1)), nn.Parameter(normal(1, H))
    module._flat_weights_names = ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected no projection"):
        module(normal(3, 1, I))
    for dropout in (-0.5, 1.5, math.nan, "a"):
        module = make("LSTM")
        module.dropout = dropout
        assert _C.forward("lstm", module.__dict__, True, *arguments(module)) is None


def test_memory_between_layers(monkeypatch):
    """Two outputs of layers at a time, one of them the last one's, as in the operators; all of them in a wavefront."""
    made, new_empty = [], Tensor.new_empty

    def spy(*arguments):
        made.append(arguments[1:])
        return new_empty(*arguments)

    monkeypatch.setattr(Tensor, "new_empty", spy)
    for directions in (1, 2):
        module = fastrnn.RNN(1, 16, num_layers=5, bidirectional=directions == 2).eval()
        for split, at_once in (("serial", 2), ("wavefront", 5 if directions == 1 else 2)):
            made.clear()
            with torch.no_grad(), shared_out(split, 2):
                module(normal(64, 4, 1))
            assert made.count((64, 4, 16 * directions)) == at_once


def test_dropout_goes_by_the_operators(served):
    module = build("GRU", I, H, num_layers=2, dropout=0.5)
    x, hx = arguments(module)
    for training in (True, False):
        module.train(training)
        results = []
        for way in (long_way, contextlib.nullcontext):
            torch.manual_seed(5)
            with torch.no_grad(), way():
                served.clear()
                results.append(module(x, hx))
        assert served == [not training]
        alike(*results)


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def dual_level():
    with torch.autograd.forward_ad.dual_level():
        yield


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_whatever_watches_sees_the_operator(name, frozen, served):
    module = make(name, frozen=frozen)
    x, hx = arguments(module)
    one = x if name == "GRUCell" else x[0]
    with torch.no_grad():
        plain = module(x, hx)
        for mode in (Functions(), Dispatches(), dual_level(), torch.autocast("cpu", torch.bfloat16)):
            served.clear()
            with mode:
                module(x, hx)
                module.step(one, clones(hx))
            assert len(served) >= 2 and not any(served)  # step's long way may try forward
            if isinstance(mode, Dispatches):
                assert any("fastrnn." in n for n in mode.names)
            if isinstance(mode, Functions):
                assert "is_neg" not in mode.names
        with profile(activities=[ProfilerActivity.CPU]) as found:
            module(x, hx)
            module.step(one, clones(hx))
        assert {e.name for e in found.events()} >= {"fastrnn::step_"}
        traced = torch.jit.trace(module, (x, hx), check_trace=False)
        alike(module(x, hx), plain)
        torch.testing.assert_close(traced(x, hx), plain)
    served.clear()
    assert tensors_in(module(x, hx))[0].requires_grad  # a graph is recorded: not asked for
    assert not any(served)
    with torch.inference_mode():
        both(module, *arguments(module), served)


def test_vmap(served):
    module = make("GRUCell")
    x, h = arguments(module)
    with torch.no_grad():
        expected = module(x, h)
        served.clear()
        found = torch.vmap(module)(x, h)
    assert served == [False]
    torch.testing.assert_close(found, expected)


def test_values_that_are_not_in_memory(served):
    """Negated views, zero tensors, sparse and oneDNN layouts: as torch.nn has them."""
    module = make("GRUCell")
    x, h = arguments(module)
    negated = torch.view_as_complex(normal(*x.shape, 2)).conj().imag
    assert negated.is_neg()
    both(module, negated, h, served, False)
    both(module, x, torch._efficientzerotensor(h.shape), served, False)
    both(module, x, torch._efficientzerotensor((7, H))[2:], served, False)  # has an address: its offset
    weight = torch.view_as_complex(normal(*module.weight_ih.shape, 2)).conj().imag
    module.weight_ih = nn.Parameter(weight, requires_grad=False)
    assert module.weight_ih.is_neg()
    both(module, x, h, served, False)
    for odd in (x.to_sparse(), x.to_mkldnn(), x.to("meta"), torch.nested.nested_tensor(list(x)), x.cfloat()):
        assert _C.forward("gru", module.__dict__, False, odd, h) is None
        assert _C.step_onto("gru", module.__dict__, False, odd, h, None, None) is False
        assert _C.step_onto("gru", module.__dict__, False, x, odd, None, None) is False


WRONG = {
    "features": lambda x, hx: (normal(*x.shape[:-1], I + 1), hx),
    "rows": lambda x, hx: (x, normal(*hx.shape[:-2], 4, H)),
    "units": lambda x, hx: (x, normal(*hx.shape[:-1], H + 1)),
    "dimensions of the state": lambda x, hx: (x, hx[0]),
    "dimensions of the input": lambda x, hx: (x[None], hx),
    "dtype": lambda x, hx: (x.double(), hx),
    "dtype of the state": lambda x, hx: (x, hx.double()),
    "a pair": lambda x, hx: (x, (hx, hx)),
    "not a tensor": lambda x, hx: (x.numpy(), hx),
    "nothing": lambda x, hx: (None, hx),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_errors_are_torchs(name, frozen, wrong, served):
    """What torch.nn says, or, where it copes, its result."""
    module = make(name, frozen=frozen)
    x, hx = WRONG[wrong](*arguments(module))
    twin = getattr(nn, name)(I, H).eval()
    twin.load_state_dict(module.state_dict())
    results = []
    with torch.no_grad():
        for m in (twin, module):
            served.clear()
            try:
                results.append(tensors_in(m(x, hx)))
            except Exception as error:
                results.append((type(error), str(error)))
    assert served == [False]
    if isinstance(results[0], tuple):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(results[1], results[0])


def test_changed_modules(served):
    """Weights and attributes are read at each call."""
    module = make("GRU")
    x, hx = arguments(module)
    before = both(module, x, hx, served)
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.5)
        module.bias_ih_l0.data = module.bias_ih_l0.data + 1
    after = both(module, x, hx, served)
    assert not torch.equal(before[0], after[0])
    module.weight_ih_l0 = nn.Parameter(normal(3 * H, I))
    both(module, x, hx, served)
    with torch.no_grad():
        parameters = {n: p + 1 for n, p in module.named_parameters()}
        expected = module(x, hx)
        served.clear()
        assert not torch.equal(torch.func.functional_call(module, parameters, (x, hx))[0], expected[0])
        assert served == [True]
    module.weight_hh_l0 = nn.Parameter(normal(H, 3 * H).t())
    both(module, x, hx, served, False)  # the operator copies it
    nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    both(module, x, hx, served, False)


def test_changed_attributes_of_a_frozen_module(served):
    for attribute, value in (("hidden_size", H + 1), ("input_size", I + 1), ("num_layers", 2), ("proj_size", 3)):
        module = make("GRU", frozen=True)
        x, hx = arguments(module)
        setattr(module, attribute, value)
        for arguments_now in ((x, hx), (normal(1, 5, I + 1), hx), (x, normal(1, 5, H + 1)), (x, normal(2, 5, H))):
            assert _C.forward("gru", module.__dict__, True, *arguments_now) is None


@pytest.mark.parametrize("allowed", ["none", "ieee", "tf32", "bf16"])
def test_precision(allowed, served, isa):
    """What torch's switch allows, as in the operators; frozen weights are of one precision."""
    before = torch.backends.mkldnn.rnn.fp32_precision
    modules = [make("LSTM"), make("LSTM", frozen=True)]
    x, hx = arguments(modules[0], 2)
    try:
        torch.backends.mkldnn.rnn.fp32_precision = allowed
        both(modules[0], x, hx, served)
        both(modules[1], x, hx, served)
    finally:
        torch.backends.mkldnn.rnn.fp32_precision = before


@pytest.mark.skipif(len(_C.isas()) < 2, reason="this machine runs one instruction set alone")
def test_another_instruction_set():
    module = make("GRU", frozen=True)
    x, hx = arguments(module)
    before = _C.isa()
    try:
        _C.set_isa("scalar")
        assert _C.forward("gru", module.__dict__, True, x, hx) is None  # the operator says why (test_frozen.py)
    finally:
        _C.set_isa(before)


def test_threads_change_no_bit(served):
    before = torch.get_num_threads()
    try:
        for name in ("LSTM", "GRUCell"):
            module = getattr(fastrnn, name)(256, 256).eval()
            x, hx = arguments(module, 8)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(both(module, x, hx, served))
            for other in results[1:]:
                alike(other, results[0])
    finally:
        torch.set_num_threads(before)


def test_new_tensors_are_ordinary(served):
    """Made by torch: their memory may grow, and in deterministic mode holds no secrets."""
    module = make("LSTM")
    x, hx = arguments(module)
    output, (h_n, c_n) = both(module, x, hx, served)
    for t in (output, h_n, c_n):
        assert t.resize_(3, 5, H).shape == (3, 5, H)
        assert t._version >= 0 and t.grad_fn is None and t.is_leaf


def test_attributes_that_a_class_computes(served):
    """Are no business of the direct way, which reads what the object holds."""

    class AlwaysDrops(fastrnn.LSTM):
        training = property(lambda self: True, lambda self, value: None)

    class BatchFirst(fastrnn.GRU):
        batch_first = property(lambda self: True, lambda self, value: None)

    drops = AlwaysDrops(I, H, 2, dropout=0.5)
    x = normal(1, 5, I)
    with torch.no_grad():
        assert not torch.equal(drops(x)[0], drops(x)[0])
        assert BatchFirst(I, H)(normal(1, 4, I))[1].shape == (1, 1, H)
    assert not any(served)


def test_frozen_modules_that_have_thawed(served):
    """Changed weights, and those that went through a pickle, are packed no more, and served all the same."""
    module = make("LSTM", frozen=True)
    x, hx = arguments(module)
    kept = both(module, x, hx, served)
    alike(both(pickle.loads(pickle.dumps(module)), x, hx, served), kept)
    with torch.no_grad():
        module.weight_ih_l0.mul_(2)
    assert not torch.equal(both(module, x, hx, served)[0], kept[0])
    both(copy.deepcopy(module), x, hx, served)
