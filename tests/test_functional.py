"""fastrnn.functional: the same calls with weights as arguments, and errors that name the argument."""

import pytest
import torch
from conftest import KINDS, build, flat, tensors_in
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
import fastrnn.functional as F


def call(kind, *args, **kwargs):
    if kind.startswith("RNN"):
        return F.rnn(*args, nonlinearity=kind[4:].lower(), **kwargs)
    return getattr(F, kind.lower())(*args, **kwargs)


@pytest.mark.parametrize("layout", ["time first", "batch first", "packed", "unbatched"])
@pytest.mark.parametrize(("bias", "directions", "layers"), [(True, 1, 1), (False, 2, 1), (True, 2, 3)])
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_is_the_module(kind, bias, directions, layers, layout):
    kind, *projected = kind.split()
    extra = {"proj_size": 3} if projected else {}
    first = layout == "batch first"
    rnn = build(kind, 5, 7, num_layers=layers, bias=bias, bidirectional=directions == 2, batch_first=first, **extra)
    P, K = 3 if projected else 7, layers * directions
    x = torch.randn(4, 5) if layout == "unbatched" else torch.randn(4, 4, 5)
    if layout == "packed":
        x = pack_padded_sequence(x, [2, 4, 3, 1], enforce_sorted=False)
    batch = () if layout == "unbatched" else (4,)
    h0, c0 = torch.randn(K, *batch, P), torch.randn(K, *batch, 7)
    for hx in (None, (h0, c0) if kind == "LSTM" else h0):
        for all_states in (False, True):
            arguments = (rnn._flat_weights, bias, layers, 0.0, False, directions == 2, first)
            found = call(kind, x, hx, *arguments, all_states=all_states)
            expected = rnn(x, hx, all_states=all_states)
            assert isinstance(found[0], PackedSequence) == (layout == "packed")
            assert len(found) == 2 + all_states
            assert isinstance(found[1], tuple) == (kind == "LSTM")
            assert all(a.equal(b) for a, b in zip(tensors_in(found), tensors_in(expected), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_modules(kind):
    rnn, x = build(kind, 5, 7), torch.randn(6, 4, 5, requires_grad=True)
    reset, lengths = torch.rand(6, 4) < 0.3, torch.tensor([6, 1, 0, 4])
    leaves = [x, *rnn.parameters()]
    a = torch.autograd.grad(rnn(x, reset=reset, lengths=lengths)[0].square().sum(), leaves)
    output = call(kind, x, None, list(rnn.parameters()), reset=reset, lengths=lengths)[0]
    b = torch.autograd.grad(output.square().sum(), leaves)
    assert all(p.equal(q) for p, q in zip(a, b, strict=True))


def test_dropout_acts_only_in_training():
    rnn, x = fastrnn.GRU(5, 7, num_layers=2, dropout=0.5), torch.randn(6, 4, 5)
    weights = rnn._flat_weights
    torch.manual_seed(3)
    expected, _ = rnn(x)
    torch.manual_seed(3)
    assert F.gru(x, None, weights, num_layers=2, dropout=0.5, training=True)[0].equal(expected)
    assert F.gru(x, None, weights, num_layers=2, dropout=0.5, training=False)[0].equal(rnn.eval()(x)[0])


W = [torch.randn(28, 5), torch.randn(28, 7), torch.randn(28), torch.randn(28)]
X = torch.randn(6, 4, 5)
HX = (torch.zeros(1, 4, 7), torch.zeros(1, 4, 7))
BAD = {
    "input is a list": (dict(input=[1, 2]), TypeError, "input"),
    "input is 1-D": (dict(input=torch.zeros(5)), ValueError, "input"),
    "input is 4-D": (dict(input=torch.zeros(1, 6, 4, 5)), ValueError, "input"),
    "input has other features": (dict(input=torch.zeros(6, 4, 6)), ValueError, "weights"),
    "input is double": (dict(input=X.double()), ValueError, "weights"),
    "no weights": (dict(weights=[]), ValueError, "weights"),
    "too few weights": (dict(weights=W[:3]), ValueError, "weights"),
    "weights of two layers": (dict(weights=W * 2), ValueError, "weights"),
    "weight is a list": (dict(weights=[W[0], W[1], W[2], [1.0] * 28]), TypeError, "weights"),
    "weight is transposed": (dict(weights=[W[0], W[1].t(), W[2], W[3]]), ValueError, "weights"),
    "bias is short": (dict(weights=[W[0], W[1], W[2], torch.zeros(27)]), ValueError, "weights"),
    "weights of two dtypes": (dict(weights=[W[0], W[1].double(), W[2], W[3]]), ValueError, "weights"),
    "weights on another device": (dict(weights=[w.to("meta") for w in W]), ValueError, "weights"),
    "hx is one tensor": (dict(hx=HX[0]), TypeError, "hx"),
    "hx has three": (dict(hx=HX + HX[:1]), TypeError, "hx"),
    "hx holds numbers": (dict(hx=(0.0, 0.0)), TypeError, "hx"),
    "h0 has another batch": (dict(hx=(torch.zeros(1, 3, 7), HX[1])), ValueError, "hx"),
    "c0 has another width": (dict(hx=(HX[0], torch.zeros(1, 4, 6))), ValueError, "hx"),
    "hx of two layers": (dict(hx=(torch.zeros(2, 4, 7), torch.zeros(2, 4, 7))), ValueError, "hx"),
    "no layers": (dict(num_layers=0), ValueError, "num_layers"),
    "dropout is 2": (dict(dropout=2.0), ValueError, "dropout"),
    "dropout is negative": (dict(dropout=-0.1), ValueError, "dropout"),
    "lengths too long": (dict(lengths=torch.tensor([1, 2, 3, 7])), ValueError, "lengths"),
    "reset is float": (dict(reset=torch.zeros(6, 4)), TypeError, "reset"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named(name):
    change, error, argument = BAD[name]
    arguments = dict(input=X, hx=HX, weights=W) | change
    with pytest.raises(error, match=rf"^{argument}") as caught:
        F.lstm(**arguments)
    assert "expected" in str(caught.value)
    assert "got" in str(caught.value)


def test_bad_nonlinearity_is_named():
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got 'sine'"):
        F.rnn(X, None, W, nonlinearity="sine")


def test_lengths_with_packed_input_is_named():
    with pytest.raises(ValueError, match="^lengths"):
        F.lstm(pack_padded_sequence(X, [6, 5, 2, 1]), None, W, lengths=torch.tensor([6, 5, 2, 1]))


def test_packed_data_that_does_not_add_up_is_named():
    with pytest.raises(ValueError, match="^input"):
        F.lstm(PackedSequence(torch.zeros(7, 5), torch.tensor([4, 2])), None, W)


def test_no_steps():
    with pytest.raises(RuntimeError, match="larger than 0"):
        F.lstm(torch.zeros(0, 4, 5), None, W)


def test_new_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        F.lstm(X, HX, W, True, 1, 0.0, False, False, False, torch.zeros(6, 4, dtype=torch.bool))


def test_hx_defaults_to_zero():
    assert F.lstm(X, None, W)[0].equal(F.lstm(X, HX, W)[0])
    assert all(h.shape == (1, 4, 7) for h in flat(F.lstm(X, None, W)[1]))


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_all_states_is_a_bool(value):
    rnn, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    for call in (
        lambda: rnn(x, all_states=value),
        lambda: fastrnn.functional.gru(x, None, list(rnn.parameters()), all_states=value),
    ):
        with pytest.raises(TypeError, match=f"all_states: expected a bool, got {type(value).__name__}"):
            call()


def free(t):
    t.untyped_storage().resize_(0)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNNCell", "LSTMCell"])
def test_a_tensor_whose_memory_is_gone_is_named(kind, gradients):
    """As after untyped_storage().resize_(0), by which some give memory back for a while: torch.nn may crash then."""

    def made():
        rnn = getattr(fastrnn, kind)(5, 7)
        steps = () if kind.endswith("Cell") else (4,)
        layers = () if kind.endswith("Cell") else (1,)
        state = [torch.randn(*layers, 3, 7) for _ in range(2 if kind.startswith("LSTM") else 1)]
        return rnn, torch.randn(2, *steps, 3, 5)[1], state

    for lost in ("input", "state", "weight", "bias"):
        rnn, x, state = made()
        weights = [p.detach() for p in rnn.parameters()]
        free({"input": x, "state": state[-1], "weight": weights[1], "bias": weights[3]}[lost])
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match="whose storage is empty"):
            rnn(x, tuple(state) if len(state) == 2 else state[0])
    if not gradients:
        return
    for lost in ("input", "weight"):
        rnn, x, state = made()
        found = rnn(x.requires_grad_(), tuple(state) if len(state) == 2 else state[0])
        free(x.detach() if lost == "input" else [p.detach() for p in rnn.parameters()][1])
        with pytest.raises(RuntimeError, match="whose storage is empty"):
            sum(t.sum() for t in tensors_in(found)).backward()
