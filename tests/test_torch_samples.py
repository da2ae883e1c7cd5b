"""torch's samples (ModuleInfo) of the six classes, with ours: results by the rule, errors equal in type and text."""

import itertools
import warnings

import pytest
import torch
from conftest import dtype_name, tensors_in, with_gradients
from torch.nn.utils.rnn import PackedSequence

import fastrnn

common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="torch's samples are private: this torch does not ship them"
)

NAMES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]
INFOS = {info.module_cls.__name__: info for info in common_modules.module_db if info.module_cls.__name__ in NAMES}
# How many torch 2.13 has, per class: fewer would mean that this file lost its samples without anyone noticing.
LEAST = {"RNN": 32, "GRU": 16, "LSTM": 32, "RNNCell": 3, "GRUCell": 2, "LSTMCell": 2}
LEAST_ERRORS = {"RNN": 4, "GRU": 4, "LSTM": 4, "RNNCell": 6, "GRUCell": 6, "LSTMCell": 4}


def samples(name, dtype, training, seed, packed=True):
    torch.manual_seed(seed)
    extra = {"with_packed_sequence": packed} if name in ("RNN", "GRU") else {}
    info = INFOS[name]
    return list(info.module_inputs_func(info, "cpu", dtype, True, training, **extra))


def error_samples(name, dtype):
    torch.manual_seed(0)
    info = INFOS[name]
    return list(info.module_error_inputs_func(info, "cpu", dtype, False, True))


def convert(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.detach().to(dtype).requires_grad_()
    if isinstance(value, PackedSequence):
        return PackedSequence(convert(value.data, dtype), *value[1:])
    return tuple(convert(v, dtype) for v in value)


def run(cls, sample, dtype, training, seed):
    torch.manual_seed(seed)
    module = cls(*sample.constructor_input.args, **sample.constructor_input.kwargs).to(dtype).train(training)
    given = [convert(v, dtype) for v in sample.forward_input.args]
    return with_gradients(module(*given), tensors_in(given) + list(module.parameters()))


@pytest.mark.parametrize(
    ("dtype", "training"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, True)],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_sample(name, dtype, training, rule, record_property):
    count = len(samples(name, dtype, training, 0))
    assert count >= LEAST[name]
    for index in range(count):

        def three(n, index=index):
            sample = samples(name, dtype, training, n)[index]
            if dtype != torch.float32 and "relu" in str(sample.constructor_input.kwargs):
                sample.constructor_input.kwargs["nonlinearity"] = "tanh"  # 16 bits decide relu's derivative by luck
            ours, theirs = (run(getattr(nn, name), sample, dtype, training, n) for nn in (fastrnn, torch.nn))
            return ours, theirs, run(getattr(torch.nn, name), sample, torch.float64, training, n)

        rule.check(three, dtype, f"{name} sample {index} {dtype_name(dtype)} training={training}")
    record_property("samples", count)


@pytest.mark.parametrize("name", NAMES)
def test_float64_sample(name):
    """Two float64 results, a few roundings apart (test_accuracy.py has the truth for float64)."""
    for sample in samples(name, torch.float64, True, 0):
        ours, theirs = (run(getattr(nn, name), sample, torch.float64, True, 0) for nn in (fastrnn, torch.nn))
        for key, want in theirs.items():
            assert (ours[key] is None) == (want is None)
            if want is not None:
                assert (ours[key] - want).norm() <= 1e-14 * want.norm(), (name, key, sample.constructor_input.kwargs)


def outcome(cls, constructor, forward):
    """(where, type, text) of the error, or None."""
    try:
        module = cls(*constructor.args, **constructor.kwargs)
    except Exception as error:
        return "constructor", type(error), str(error)
    if forward is None:
        return None
    try:
        module(*forward.args, **forward.kwargs)
    except Exception as error:
        return "forward", type(error), str(error)
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("name", NAMES)
def test_error_sample(name, dtype, record_property):
    given = error_samples(name, dtype)
    raised = 0
    for sample in given:
        constructor, forward = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        theirs = outcome(getattr(torch.nn, name), constructor, forward)
        assert outcome(getattr(fastrnn, name), constructor, forward) == theirs
        raised += theirs is not None
    assert raised >= LEAST_ERRORS[name]
    record_property("error samples", raised)


FLOAT = torch.float32
SHAPES = [(), (3,), (4, 3), (4, 5), (5, 4, 3), (4, 5, 3), (5, 4, 2), (0, 4, 3), (5, 0, 3), (2, 5, 4, 3)]
HIDDEN = [None, (), (3,), (6,), (4, 6), (1, 6), (2, 6), (1, 4, 6), (2, 4, 6), (1, 5, 6), (1, 4, 5), (1, 1, 1, 6)]


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_shape_good_or_bad(name, options):
    """All pairs of shapes, legal or not: the same error, or results of the same shape, dtype and strides of meaning."""
    cell = name.endswith("Cell")
    if cell and options:
        options = {"bias": False} if "batch_first" in options else {}
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(3, 6, **options)
    ours = getattr(fastrnn, name)(3, 6, **options)
    ours.load_state_dict(theirs.state_dict())
    legal = 0
    for shape, hidden in itertools.product(SHAPES, HIDDEN):
        for dtype in (FLOAT, torch.float64, torch.int64) if hidden is None else (FLOAT,):
            x = torch.ones(shape, dtype=dtype)
            hx = None if hidden is None else torch.ones(hidden)
            if "LSTM" in name and hx is not None:
                hx = (hx, hx.clone())
            found = []
            for module in (ours, theirs):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("error")
                        result = module(x, hx) if hx is not None else module(x)
                    found.append([(t.shape, t.dtype) for t in tensors_in(result)])
                except Exception as error:
                    found.append((type(error), str(error)))
            assert found[0] == found[1], (name, options, shape, hidden, dtype)
            legal += isinstance(found[1], list)
    assert legal >= 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hx", ["text", 3, [1, 2], (), ("a", "b")], ids=repr)
def test_hx_of_the_wrong_kind(name, hx):
    theirs, ours = getattr(torch.nn, name)(3, 6), getattr(fastrnn, name)(3, 6)
    x = torch.randn(4, 3) if name.endswith("Cell") else torch.randn(5, 4, 3)
    for good in (x, x.double()):
        with pytest.raises(Exception) as expected:  # noqa: B017, PT011  (whatever torch raises)
            theirs(good, hx)
        with pytest.raises(type(expected.value)) as caught:
            ours(good, hx)
        assert str(caught.value) == str(expected.value)


def test_hx_on_another_device():
    for name in ("LSTM", "GRU"):
        texts = []
        for nn in (torch.nn, fastrnn):
            hx = torch.zeros(1, 4, 6, device="meta")
            with pytest.raises(RuntimeError) as caught:
                getattr(nn, name)(3, 6)(torch.randn(5, 4, 3), (hx, hx) if name == "LSTM" else hx)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("sizes", [[4, 4, 5], [0], [], [4, 2, 0], [9, 9]], ids=str)
def test_a_packed_sequence_that_is_not_one(sizes):
    """Hand-made batch sizes: what torch refuses, we refuse in its words; what it accepts, we compute."""
    torch.manual_seed(0)
    theirs, ours = torch.nn.GRU(3, 6), fastrnn.GRU(3, 6)
    ours.load_state_dict(theirs.state_dict())
    found = []
    for module in (theirs, ours):
        try:
            output, h_n = module(PackedSequence(torch.ones(13, 3), torch.tensor(sizes, dtype=torch.int64)))
            found.append((output.data.shape, h_n.shape))
        except Exception as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


def test_all_six_classes_have_samples():
    assert sorted(INFOS) == sorted(NAMES)
