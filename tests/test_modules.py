"""torch.nn's contract, point by point, on the three sequence classes: what users' code relies on without saying so."""

import copy
import io
import pickle

import pytest
import torch
from conftest import KINDS, against_torch, build, flat, normal, pair, tensors_in, with_gradients
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn

CLASSES = ["RNN", "GRU", "LSTM"]


def data(dtype=torch.float32, seed=0, T=6, B=4, I=5):
    return normal(T, B, I, dtype=dtype, seed=seed + 50).requires_grad_()


def train(module, dtype, seed):
    """Forward and backward: outputs, and gradients of the input and of every parameter that takes one."""
    x = data(dtype, seed)
    wanted = [p for p in module.parameters() if p.requires_grad]
    return with_gradients(module(x), [x, *wanted])


def bits(a, b):
    a, b = tensors_in(a), tensors_in(b)
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))


# Identity: what the object is.


@pytest.mark.parametrize("name", CLASSES)
def test_is_torchs_class(name):
    module = getattr(fastrnn, name)(5, 7)
    assert isinstance(module, getattr(nn, name))
    assert isinstance(module, nn.RNNBase)
    assert type(module).__name__ == name
    assert issubclass(getattr(fastrnn, name), getattr(nn, name))


CONSTRUCTORS = [
    ("RNN", (5, 7, 2, "relu"), {}),
    ("RNN", (5, 7), {"nonlinearity": "tanh", "bias": False}),
    ("GRU", (5, 7, 3, False, True, 0.25, True), {}),
    ("LSTM", (5, 7, 2, True, True, 0.5, True, 3), {}),
    ("LSTM", (5, 7), {"dtype": torch.float64}),
]


@pytest.mark.parametrize(("name", "args", "options"), CONSTRUCTORS)
def test_same_seed_same_weights_same_text(name, args, options):
    found = []
    for module in (nn, fastrnn):
        torch.manual_seed(4)
        found.append(getattr(module, name)(*args, **options))
    theirs, ours = found
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    assert ours._flat_weights_names == theirs._flat_weights_names


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_goes_both_ways(kind):
    options = {"num_layers": 2, "bidirectional": True}
    theirs, ours = build(kind, 5, 7, module=nn, **options), build(kind, 5, 7, **options)
    x = data()
    assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
    before = ours(x)
    other = build(kind, 5, 7, **options)
    assert not bits(other(x), before)
    other.load_state_dict(theirs.state_dict())
    assert bits(other(x), before)


def copies(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)
    yield copy.copy(module)


@pytest.mark.parametrize("name", CLASSES)
def test_copies_compute_the_same(name):
    module = getattr(fastrnn, name)(5, 7, num_layers=2, bidirectional=True)
    x = data()
    expected = module(x)
    for other in copies(module):
        assert type(other) is type(module)
        assert bits(other(x), expected)
    deep = copy.deepcopy(module)
    with torch.no_grad():
        deep.weight_hh_l0.zero_()
    assert bits(module(x), expected)
    assert not bits(deep(x), expected)


def test_an_old_pickle_without_proj_size():
    module = fastrnn.LSTM(5, 7)
    expected = module(data())
    state = module.__getstate__()
    del state["proj_size"]
    module.__setstate__(state)
    assert module.proj_size == 0
    assert bits(module(data()), expected)


def test_share_memory():
    module = fastrnn.GRU(5, 7)
    expected = module(data())
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    assert bits(module(data()), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_meta_device(name):
    module = getattr(fastrnn, name)(5, 7, num_layers=2, bidirectional=True, batch_first=True, device="meta")
    theirs = getattr(nn, name)(5, 7, num_layers=2, bidirectional=True, batch_first=True, device="meta")
    x = torch.empty(4, 6, 5, device="meta")
    for mine, torchs in zip(tensors_in(module(x)), tensors_in(theirs(x)), strict=True):
        assert mine.device.type == "meta"
        assert mine.shape == torchs.shape
        assert mine.dtype == torchs.dtype
    real = module.to_empty(device="cpu")
    source = getattr(fastrnn, name)(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    real.load_state_dict(source.state_dict())
    assert bits(real(torch.ones(4, 6, 5)), source(torch.ones(4, 6, 5)))


def test_conversion_of_dtype():
    module, x = fastrnn.LSTM(5, 7, bidirectional=True), data()
    expected, _ = module(x)
    wide, _ = module.double()(x.double())
    assert wide.dtype == torch.float64
    assert (wide - expected).norm() < 1e-6 * wide.norm()
    narrow, _ = module.bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16


# The weights are whatever the attributes say at the moment of the call.


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    module = build(kind, 5, 7, num_layers=2)
    other = {n: torch.randn_like(p, requires_grad=True) for n, p in module.named_parameters()}
    x = data()
    output, _ = torch.func.functional_call(module, other, (x,))
    reference = build(kind, 5, 7, num_layers=2)
    reference.load_state_dict(other)
    assert output.equal(reference(x)[0])
    grads = torch.autograd.grad(output.sum(), list(other.values()))
    expected = torch.autograd.grad(reference(x)[0].sum(), list(reference.parameters()))
    assert bits(grads, expected)
    assert not output.equal(module(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_norm(kind, rule):
    def make(nn):
        module = build(kind, 5, 7, module=nn)
        parametrizations.weight_norm(module, "weight_hh_l0")
        return parametrizations.weight_norm(module, "weight_ih_l0")

    against_torch(rule, make, train)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm(rule):
    def make(module):
        return nn.utils.weight_norm(module.LSTM(5, 7), "weight_hh_l0")

    against_torch(rule, make, lambda m, dtype, seed: train(m, dtype, seed))


def test_orthogonal(rule):
    def make(module):
        return parametrizations.orthogonal(module.GRU(5, 7, bias=False), "weight_hh_l0", orthogonal_map="matrix_exp")

    against_torch(rule, make, train)


def test_a_parametrization_of_your_own_and_its_removal():
    class Halve(nn.Module):
        def forward(self, w):
            return w / 2

    module, x = fastrnn.GRU(5, 7), data()
    halved = copy.deepcopy(module)
    with torch.no_grad():
        halved.weight_hh_l0.div_(2)
    before = module(x)
    parametrize.register_parametrization(module, "weight_hh_l0", Halve())
    assert isinstance(module, fastrnn.GRU)
    assert bits(module(x), halved(x))
    with parametrize.cached():
        assert bits(module(x), halved(x))
    parametrize.remove_parametrizations(module, "weight_hh_l0", leave_parametrized=False)
    assert type(module) is fastrnn.GRU
    assert bits(module(x), before)


def test_pruning(rule):
    def make(module):
        rnn = module.LSTM(5, 7)
        prune.l1_unstructured(rnn, "weight_hh_l0", amount=0.5)
        return rnn

    against_torch(rule, make, train)
    rnn = make(fastrnn)
    assert (rnn.weight_hh_l0 == 0).sum() == 98
    expected = rnn(data())
    prune.remove(rnn, "weight_hh_l0")
    assert bits(rnn(data()), expected)


def test_weight_drop():
    """AWD-LSTM's: the parameter is renamed, and a plain tensor computed from it takes its place before every call."""
    rnn, x = fastrnn.LSTM(5, 7), data()
    raw = rnn.weight_hh_l0
    del rnn._parameters["weight_hh_l0"]
    rnn.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
    rnn.flatten_parameters = lambda: None
    for scale in (2.0, 0.5):
        rnn.weight_hh_l0 = rnn.weight_hh_l0_raw * scale
        output, _ = rnn(x)
        plain = fastrnn.LSTM(5, 7)
        plain.load_state_dict(
            {k.removesuffix("_raw"): v * scale if "raw" in k else v for k, v in rnn.state_dict().items()}
        )
        assert output.equal(plain(x)[0])
        (grad,) = torch.autograd.grad(output.sum(), rnn.weight_hh_l0_raw)
        (expected,) = torch.autograd.grad(plain(x)[0].sum(), plain.weight_hh_l0)
        assert grad.equal(expected * scale)


def test_weights_changed_behind_torchs_back():
    """.data, numpy and set_ leave `_version` alone: nothing of a weight may be kept from call to call."""
    rnn, x = fastrnn.GRU(5, 7), data()
    with torch.inference_mode():
        rnn(x)
        rnn.weight_ih_l0.data.mul_(3)
        rnn.weight_hh_l0.detach().numpy()[:] *= 0.5
        changed = rnn(x)
    fresh = fastrnn.GRU(5, 7)
    fresh.load_state_dict(rnn.state_dict())
    assert bits(fresh(x), changed)


def test_tied_weights_add_their_gradients(rule):
    def make(module):
        rnn = module.LSTM(5, 7, bidirectional=True)
        rnn.weight_hh_l0_reverse = rnn.weight_hh_l0
        rnn.weight_ih_l0_reverse = rnn.weight_ih_l0
        rnn.bias_hh_l0 = rnn.bias_ih_l0
        return rnn

    assert len(list(make(fastrnn).parameters())) == 5
    against_torch(rule, make, train)


@pytest.mark.parametrize("frozen", ["bias_hh", "weight_hh", "weight_ih", "l1"])
def test_frozen_weights(frozen, rule):
    def make(module):
        rnn = module.GRU(5, 7, num_layers=2)
        for n, p in rnn.named_parameters():
            p.requires_grad_(frozen not in n)
        return rnn

    against_torch(rule, make, train)
    rnn = make(fastrnn)
    rnn(data())[0].sum().backward()
    assert all((p.grad is None) == (frozen in n) for n, p in rnn.named_parameters())


def test_expanded_and_strided_weights(rule):
    def call(rnn, dtype, seed):
        weights = {
            n: normal(*p.shape[::-1], dtype=dtype, seed=seed).t() for n, p in rnn.named_parameters() if p.dim() == 2
        }
        weights |= {
            n: normal(1, dtype=dtype, seed=seed).expand(p.shape) for n, p in rnn.named_parameters() if p.dim() == 1
        }
        leaves = [w.detach().requires_grad_() for w in weights.values()]
        x = data(dtype, seed)
        return with_gradients(
            torch.func.functional_call(rnn, dict(zip(weights, leaves, strict=True)), (x,)), [x, *leaves]
        )

    against_torch(rule, lambda module: module.LSTM(5, 7), call)


def test_replicas_of_data_parallel():
    """DataParallel gives a replica plain tensors for parameters, computed from the master's."""
    rnn, x = fastrnn.LSTM(5, 7, num_layers=2), data()
    replica = rnn._replicate_for_data_parallel()
    scaled = {n: p * 2 for n, p in rnn.named_parameters()}
    for name, value in scaled.items():
        setattr(replica, name, value)
    output, _ = replica(x)
    assert output.equal(torch.func.functional_call(rnn, scaled, (x,))[0])
    output.sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())
    assert nn.DataParallel(rnn)(x)[0].equal(rnn(x)[0])


def test_subclasses_of_users():
    class Mine(fastrnn.LSTM):
        def forward(self, input, hx=None):
            output, state = super().forward(input * 2, hx)
            return output + 1, state

    class Raw(fastrnn.LSTM):
        def forward(self, input, hx):
            return torch._VF.lstm(input, hx, self._flat_weights, True, 1, 0.0, self.training, False, False)

    rnn, x = Mine(5, 7), data()
    plain = fastrnn.LSTM(5, 7)
    plain.load_state_dict(rnn.state_dict())
    assert rnn(x)[0].equal(plain(x * 2)[0] + 1)
    hx = (torch.zeros(1, 4, 7), torch.zeros(1, 4, 7))
    assert Raw(5, 7)(x, hx)[0].shape == (6, 4, 7)


def test_reset_parameters_override_is_used():
    class Ones(fastrnn.GRU):
        def reset_parameters(self):
            for p in self.parameters():
                nn.init.ones_(p)

    assert all((p == 1).all() for p in Ones(5, 7).parameters())


def test_hooks():
    rnn, seen = fastrnn.GRU(5, 7), []
    rnn.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    rnn.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    rnn.register_full_backward_hook(lambda m, gi, go: seen.append(gi[0]))
    x = data()
    rnn(x)[0].sum().backward()
    assert seen[0].shape == (6, 4, 7)
    assert seen[1].shape == x.shape
    # full backward hooks see the gradient of the module's own input, the doubled one
    assert x.grad.equal(2 * seen[1])


# Memory: whose is what.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_h_n_is_fresh_and_writable(kind, batch_first):
    rnn = build(kind, 5, 7, num_layers=2, bidirectional=True, batch_first=batch_first)
    with torch.no_grad():
        for x in (torch.randn(1, 4, 5), torch.randn(4, 1, 5), torch.randn(6, 4, 5)):
            output, hidden = rnn(x)
            assert output.is_contiguous()
            assert output.view(-1, 14).shape[0] == x.shape[0] * x.shape[1]
            kept = output.clone()
            places = {output.untyped_storage().data_ptr()}
            for h in flat(hidden):
                assert h.is_contiguous()
                places.add(h.untyped_storage().data_ptr())
                h.fill_(torch.nan)
            assert len(places) == 1 + len(flat(hidden))
            assert output.equal(kept)


@pytest.mark.parametrize("change", ["relu_", "iadd"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_in_place_change_of_the_results_before_backward(kind, layers, change):
    """`relu_`, `+=` on output, h_n and c_n: torch allows it, since backward reads none of them."""
    rnn = build(kind, 5, 7, num_layers=layers, bidirectional=True)
    grads = []
    for in_place in (False, True):
        x = data()
        output, hidden = rnn(x)
        if in_place:
            output = output.relu_() if change == "relu_" else output.__iadd__(1)
            for h in flat(hidden):
                h.mul_(2).sub_(3)
        else:
            output = output.relu() if change == "relu_" else output + 1
            hidden = [h * 2 - 3 for h in flat(hidden)]
        loss = (output**2).sum() + sum((h**2).sum() for h in flat(hidden))
        grads.append(torch.autograd.grad(loss, [x, *rnn.parameters()]))
    assert bits(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_change_of_the_arguments_is_an_error_as_in_torch(kind):
    ours, theirs = pair(kind, 5, 7)
    for rnn in (theirs, ours):
        x = data().detach().clone()
        output, _ = rnn(x)
        with torch.no_grad():
            rnn.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_inputs_are_left_alone():
    rnn, x = fastrnn.LSTM(5, 7, batch_first=True), data().detach()
    h0, c0 = torch.randn(1, 6, 7), torch.randn(1, 6, 7)
    kept = [v.clone() for v in (x, h0, c0, *rnn.parameters())]
    output, _ = rnn(x, (h0, c0))
    output.sum().backward()
    assert bits((x, h0, c0, *rnn.parameters()), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_of_input_and_hx(kind):
    rnn = build(kind, 5, 7)
    x, h0 = data().detach(), torch.randn(1, 1, 7)
    hx = (h0, h0) if kind == "LSTM" else h0
    wide = torch.zeros(6, 9, 12)
    wide[:, ::2, ::2][:, :4, :5] = x
    views = [x.transpose(0, 1).contiguous().transpose(0, 1), wide[:, ::2, ::2][:, :4, :5]]
    views.append(x.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    spread = tuple(h.expand(1, 4, 7) for h in flat(hx))
    whole = tuple(h.repeat(1, 4, 1) for h in flat(hx))
    pick = (lambda h: h) if kind == "LSTM" else (lambda h: h[0])
    expected = rnn(x, pick(whole))
    for view in views:
        assert not view.is_contiguous()
        view.requires_grad_()
        found = rnn(view, pick(spread))
        assert bits(found, expected)
        (grad,) = torch.autograd.grad(found[0].square().sum(), view)
        contiguous = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(rnn(contiguous, pick(whole))[0].square().sum(), contiguous)
        assert grad.equal(want)
    same = x[:1].expand(6, 4, 5)
    assert bits(rnn(same), rnn(same.contiguous()))


def test_expanded_hx_adds_up_its_gradient(rule):
    def call(rnn, dtype, seed):
        x, h = data(dtype, seed), normal(1, 1, 7, dtype=dtype, seed=seed).requires_grad_()
        return with_gradients(rnn(x, (h.expand(2, 4, 7), h.expand(2, 4, 7))), [x, h, *rnn.parameters()])

    against_torch(rule, lambda module: module.LSTM(5, 7, num_layers=2), call)


def test_h0_and_c0_the_same_tensor_and_hx_a_list(rule):
    def call(rnn, dtype, seed):
        x, h = data(dtype, seed), normal(1, 4, 7, dtype=dtype, seed=seed).requires_grad_()
        return with_gradients(rnn(x, [h, h]), [x, h])

    against_torch(rule, lambda module: module.LSTM(5, 7), call)


def test_input_is_also_hx(rule):
    def call(rnn, dtype, seed):
        x = data(dtype, seed, T=1, I=7)
        return with_gradients(rnn(x, x), [x, *rnn.parameters()])

    against_torch(rule, lambda module: module.GRU(7, 7), call)
