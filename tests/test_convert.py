"""accelerate, restore and patch: same objects, other methods, and the way back."""

import contextlib
import copy
import logging
import pickle
import threading

import pytest
import torch
from test_explain import ran
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastrnn

NAMES = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnns = nn.ModuleList([nn.RNN(5, 5, nonlinearity="relu"), nn.GRU(5, 5)])
        self.deep = nn.ModuleDict({"lstm": nn.LSTM(5, 5, 2, bidirectional=True, proj_size=2)})
        self.cell = nn.LSTMCell(4, 6)
        self.shared = self.rnns[1]
        self.linear = nn.Linear(6, 1)

    def forward(self, x):
        for rnn in self.rnns:
            x, _ = rnn(x)
        x, _ = self.deep["lstm"](self.shared(x)[0])
        return self.linear(self.cell(x[-1])[0])


def types(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_the_root_is_converted(name):
    module = getattr(nn, name)(5, 7)
    assert fastrnn.accelerate(module) is module
    assert type(module) is getattr(fastrnn, name)
    assert ran(module, torch.randn(4, 5))
    assert fastrnn.restore(module) is module
    assert type(module) is getattr(nn, name)
    assert not ran(module, torch.randn(4, 5))


def test_a_model_keeps_everything_but_its_types():
    torch.manual_seed(0)
    model = Model().eval()
    calls = []
    model.rnns[0].register_forward_hook(lambda *a: calls.append(1))
    model.rnns[0].note = "mine"
    model.rnns[1].weight_hh_l0.requires_grad_(False)
    x = torch.randn(6, 4, 5)
    expected, before = model(x), types(model)
    ids = [id(m) for m in model.modules()], [id(p) for p in model.parameters()]
    assert fastrnn.accelerate(model) is model
    assert type(model.rnns[0]) is fastrnn.RNN
    assert type(model.deep["lstm"]) is fastrnn.LSTM
    assert type(model.cell) is fastrnn.LSTMCell
    assert type(model.linear) is nn.Linear
    assert model.shared is model.rnns[1]
    assert ([id(m) for m in model.modules()], [id(p) for p in model.parameters()]) == ids
    assert not any(m.training for m in model.modules())
    assert model.rnns[0].note == "mine"
    assert not model.rnns[1].weight_hh_l0.requires_grad
    calls.clear()
    found = model(x)
    assert calls == [1]
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    accelerated = types(model)
    assert types(fastrnn.accelerate(model)) == accelerated  # twice is once
    assert types(fastrnn.restore(model)) == before
    assert model(x).equal(expected)
    assert types(fastrnn.restore(model)) == before


def test_an_accelerated_model_trains_and_travels():
    model = fastrnn.accelerate(Model())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(6, 4, 5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert types(other) == types(model)
        assert other(x).equal(model(x))
    assert model.double()(x.double()).dtype == torch.float64


def test_parametrized_modules_keep_their_properties():
    rnn = nn.LSTM(5, 7)
    parametrizations.weight_norm(rnn, "weight_hh_l0")
    parametrizations.orthogonal(rnn, "weight_ih_l0")
    theirs = type(rnn)
    x = torch.randn(6, 4, 5)
    expected, _ = rnn(x)
    fastrnn.accelerate(rnn)
    assert isinstance(rnn, fastrnn.LSTM)
    assert torch.nn.utils.parametrize.is_parametrized(rnn, "weight_hh_l0")
    assert ran(rnn, x)
    assert (rnn(x)[0] - expected).norm() <= 1e-6 * expected.norm()
    rnn(x)[0].sum().backward()
    assert rnn.parametrizations.weight_hh_l0.original0.grad is not None
    kind = type(rnn)
    assert type(fastrnn.accelerate(rnn)) is kind
    fastrnn.restore(rnn)
    assert isinstance(rnn, nn.LSTM)
    assert not isinstance(rnn, fastrnn.LSTM)
    assert type(rnn).__name__ == theirs.__name__
    assert rnn(x)[0].equal(expected)
    fastrnn.accelerate(rnn)
    torch.nn.utils.parametrize.remove_parametrizations(rnn, "weight_hh_l0")
    torch.nn.utils.parametrize.remove_parametrizations(rnn, "weight_ih_l0")
    assert type(rnn) is fastrnn.LSTM


def test_pruned_modules():
    rnn = nn.GRU(5, 7)
    prune.random_unstructured(rnn, "weight_hh_l0", amount=0.5)
    x = torch.randn(6, 4, 5)
    expected, _ = rnn(x)
    assert type(fastrnn.accelerate(rnn)) is fastrnn.GRU
    assert (rnn(x)[0] - expected).norm() <= 1e-6 * expected.norm()


def test_subclasses_and_other_children_are_left_alone_and_named(caplog):
    class Mine(nn.LSTM):
        pass

    class Own(nn.RNNBase):
        def __init__(self):
            super().__init__("GRU", 5, 7)

    model = nn.ModuleDict({"mine": Mine(5, 7), "own": Own(), "gru": nn.GRU(5, 7), "ours": fastrnn.GRU(5, 7)})
    with caplog.at_level(logging.INFO, logger="fastrnn"):
        fastrnn.accelerate(model)
    assert type(model["mine"]) is Mine
    assert type(model["own"]) is Own
    assert type(model["gru"]) is fastrnn.GRU
    assert "mine" in caplog.text
    assert "Mine" in caplog.text
    assert "Own" in caplog.text
    assert "gru" not in caplog.text
    assert "ours" not in caplog.text
    fastrnn.restore(model)
    assert type(model["ours"]) is nn.GRU


@pytest.mark.parametrize("bad", [None, "model", 3, torch.zeros(3), nn.LSTM, [nn.LSTM(5, 7)]], ids=str)
def test_only_modules_are_taken(bad):
    for function in (fastrnn.accelerate, fastrnn.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
            function(bad)


def test_restore_makes_quantize_dynamic_work():
    model = nn.Sequential(fastrnn.LSTM(5, 7))
    x = torch.randn(6, 4, 5)
    expected = model(x)[0]
    quantized = torch.ao.quantization.quantize_dynamic(fastrnn.restore(model), {nn.LSTM}, dtype=torch.qint8)
    assert "DynamicQuantizedLSTM" in repr(quantized)
    assert (quantized(x)[0] - expected).norm() < 0.05 * expected.norm()


# patch


@contextlib.contextmanager
def clean():
    """torch.nn's methods before and after are the same objects."""
    before = {name: getattr(nn, name).forward for name in NAMES}
    yield
    assert all(getattr(nn, name).forward is method for name, method in before.items())
    assert not any("__prepare_scriptable__" in vars(getattr(nn, name)) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_patch_and_its_end(name):
    module, x = getattr(nn, name)(5, 7), torch.randn(4, 5)
    with clean():
        with fastrnn.patch():
            assert type(module) is getattr(nn, name)
            assert ran(module, x)
            assert ran(getattr(nn, name)(5, 7), x)
            assert ran(pickle.loads(pickle.dumps(module)), x)
        assert not ran(module, x)


def test_patch_reaches_earlier_subclasses_that_keep_forward():
    class Early(nn.LSTM):
        pass

    class Calls(nn.LSTM):
        def forward(self, x):
            return super().forward(2 * x)[0]

    class Own(nn.LSTM):
        def forward(self, x):
            return x

    x = torch.randn(6, 4, 5)
    with clean(), fastrnn.patch():
        assert ran(Early(5, 7), x)
        assert ran(Calls(5, 7), x)
        assert not ran(Own(5, 7), x)
        assert ran(fastrnn.LSTM(5, 7), x)


def test_patched_modules_have_the_new_arguments_and_torchs_errors():
    rnn, x = nn.GRU(5, 7), torch.randn(6, 4, 5)
    with clean(), fastrnn.patch():
        assert len(rnn(x, all_states=True)) == 3
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 6"):
            rnn(torch.randn(6, 4, 6))
        with pytest.raises(RuntimeError, match="larger than 0"):
            rnn(torch.randn(0, 4, 5))
    with pytest.raises(TypeError):
        rnn(x, all_states=True)


def test_patch_undoes_itself_after_an_error():
    with clean(), pytest.raises(ZeroDivisionError), fastrnn.patch():
        raise ZeroDivisionError


def test_patch_nests_and_undo_is_idempotent():
    rnn, x = nn.GRU(5, 7), torch.randn(6, 4, 5)
    with clean():
        outer = fastrnn.patch()
        with fastrnn.patch():
            assert ran(rnn, x)
        assert ran(rnn, x)
        outer.undo()
        outer.undo()
        assert not ran(rnn, x)
        first, second = fastrnn.patch(), fastrnn.patch()
        first.undo()
        assert ran(rnn, x)
        second.undo()


def test_patch_from_many_threads():
    def work():
        for _ in range(200):
            with fastrnn.patch():
                pass

    with clean():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def test_accelerate_inside_patch():
    rnn, x = nn.GRU(5, 7), torch.randn(6, 4, 5)
    with clean():
        with fastrnn.patch():
            fastrnn.accelerate(rnn)
            assert ran(rnn, x)
        assert ran(rnn, x)
        fastrnn.restore(rnn)
        assert not ran(rnn, x)
