"""fastrnn.init: the values each function promises, what it leaves alone, and weights that are not plain parameters."""

import copy
import math

import pytest
import torch
from conftest import DTYPES, KINDS, build, dtype_name, equal, normal
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastrnn
from fastrnn import init

GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}
I, H, P = 5, 12, 4
EPS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from two."""
    torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cell(kind, *args, module=fastrnn, **kwargs):
    if kind.startswith("RNN"):
        return module.RNNCell(*args, nonlinearity=kind[4:].lower(), **kwargs)
    return getattr(module, f"{kind}Cell")(*args, **kwargs)


def touched(module, function):
    """The names of the parameters that a function changes."""
    before = copy.deepcopy(module.state_dict())
    assert function(module) is module
    return {name for name, t in module.state_dict().items() if not t.equal(before[name])}


def named(module, *roles):
    return {name for name, _ in module.named_parameters() if name.startswith(roles)}


def blocks(weight, gates):
    assert weight.size(0) % gates == 0
    return weight.detach().double().chunk(gates)


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("kind", KINDS)
def test_xavier(kind, distribution):
    I, H = 60, 200
    module = build(kind, I, H, num_layers=2, bidirectional=True)
    found = touched(module, lambda m: init.xavier(m, 1.5, distribution=distribution, generator=seeded()))
    assert found == named(module, "weight_ih")
    for name in found:
        columns = I if "_l0" in name else 2 * H
        variance = 1.5**2 * 2 / (columns + H)  # the fan-out of a gate is H, whatever the number of gates
        for block in blocks(getattr(module, name), GATES[kind]):
            # Twelve thousand numbers or more: their variance has a standard deviation of at most 1.3%.
            assert block.var().item() == pytest.approx(variance, rel=0.06)
            assert abs(block.mean().item()) < 5 * math.sqrt(variance / block.numel())
            bound = math.sqrt(3 * variance)
            if distribution == "uniform":
                assert 0.999 * bound < block.abs().max() <= bound * (1 + 1e-6)
            else:
                assert block.abs().max() > 1.5 * bound


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_he(distribution):
    I, H = 60, 200
    module = fastrnn.RNN(I, H, 2, nonlinearity="relu")
    found = touched(module, lambda m: init.he(m, distribution=distribution, generator=seeded()))
    assert found == {"weight_ih_l0", "weight_ih_l1"}
    for name, columns in (("weight_ih_l0", I), ("weight_ih_l1", H)):
        weight = getattr(module, name).detach()
        assert weight.var().item() == pytest.approx(2 / columns, rel=0.06)
        assert (weight.abs().max() <= math.sqrt(6 / columns) * (1 + 1e-6)) == (distribution == "uniform")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal(kind, dtype):
    module = build(kind, I, H, num_layers=2, bidirectional=True).to(dtype)
    found = touched(module, lambda m: init.orthogonal(m, 0.5, generator=seeded()))
    assert found == named(module, "weight_hh")
    seen = []
    for name in found:
        for block in blocks(getattr(module, name), GATES[kind]):
            assert (block.t() @ block - 0.25 * torch.eye(H)).abs().max() < EPS[dtype]
            seen.append(block)
    assert min((a - b).abs().max() for i, a in enumerate(seen) for b in seen[:i]) > 0.1  # each is drawn anew


def test_orthogonal_has_no_favourite_sign():
    """LAPACK's Q alone has a first column whose first entry is never positive."""
    signs = [init.orthogonal(nn.RNN(1, 2), generator=seeded(n)).weight_hh_l0[0, 0].item() > 0 for n in range(100)]
    assert 25 < sum(signs) < 75


def test_orthogonal_with_a_projection():
    module = fastrnn.LSTM(I, H, 2, proj_size=P).double()
    assert touched(module, lambda m: init.orthogonal(m, 2.0)) == named(module, "weight_hh", "weight_hr")
    for k in range(2):
        w_hh, w_hr = getattr(module, f"weight_hh_l{k}"), getattr(module, f"weight_hr_l{k}").detach()
        assert (w_hr @ w_hr.t() - torch.eye(P)).abs().max() < 1e-14
        for block in blocks(w_hh, 4):
            assert block.shape == (H, P)
            expected = torch.tensor([2.0] * P + [0.0] * (H - P), dtype=torch.float64)
            assert (torch.linalg.svdvals(block @ w_hr) - expected).abs().max() < 1e-13


def test_a_projection_is_wider_than_the_gates_of_no_layer():
    """The smallest difference that torch.nn allows: proj_size = hidden_size - 1."""
    module = init.orthogonal(fastrnn.LSTM(I, 3, proj_size=2).double())
    for block in blocks(module.weight_hh_l0, 4):
        assert (block.t() @ block - torch.eye(2)).abs().max() < 1e-14


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_identity(nonlinearity):
    module = fastrnn.RNN(100, 50, 2, nonlinearity=nonlinearity)
    assert touched(module, lambda m: init.identity(m, 0.9, generator=seeded())) == named(module, "weight", "bias")
    for k in range(2):
        assert getattr(module, f"weight_hh_l{k}").equal(0.9 * torch.eye(50))
        assert not getattr(module, f"bias_ih_l{k}").any() and not getattr(module, f"bias_hh_l{k}").any()
        assert getattr(module, f"weight_ih_l{k}").std().item() == pytest.approx(1e-3, rel=0.1)
    init.xavier(module)
    assert not touched(module, lambda m: init.identity(m, 0.9, input_std=None))  # w_ih stays xavier's


def test_an_irnn_adds_up_its_input():
    module = init.identity(fastrnn.RNN(1, 3, nonlinearity="relu"), input_std=None)
    with torch.no_grad():
        module.weight_ih_l0.fill_(1.0)
    x = torch.arange(1.0, 6).reshape(5, 1)
    output, _ = module(x)
    assert output.equal(x.cumsum(0).expand(5, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("module", [fastrnn, nn], ids=["fastrnn", "torch.nn"])
def test_forget_bias(module, dtype):
    lstm = module.LSTM(I, H, 2, bidirectional=True).to(dtype)
    before = copy.deepcopy(lstm)
    assert touched(lstm, lambda m: init.forget_bias(m, 1.5)) == named(lstm, "bias")
    for name, bias in lstm.named_parameters():
        if name.startswith("bias"):
            i, f, g, o = bias.detach().chunk(4)
            assert f.equal(torch.full((H,), 1.5 if "_ih_" in name else 0.0, dtype=dtype))
            old = getattr(before, name).detach().chunk(4)
            equal([i, g, o], [old[0], old[2], old[3]])
    # What it is for: without input and state, a cell state decays by sigmoid(value) a step.
    silent = init.forget_bias(module.LSTMCell(1, 2).double(), 2.0)
    with torch.no_grad():
        for weight in (silent.weight_ih, silent.weight_hh):
            weight.zero_()
        for bias in (silent.bias_ih, silent.bias_hh):
            bias[4:6] = 0.0  # g: nothing comes in
        _, c = silent(torch.zeros(1, 1).double(), (torch.zeros(1, 2).double(), torch.ones(1, 2).double()))
    assert (c - 1 / (1 + math.exp(-2))).abs().max() < 1e-15


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("layered", [True, False])
def test_chrono(kind, layered):
    H, T_max = 300, 50.0
    module = build(kind, I, H, num_layers=2) if layered else cell(kind, I, H)
    module = module.double()
    old = copy.deepcopy(module)
    assert touched(module, lambda m: init.chrono(m, T_max, generator=seeded())) == named(module, "bias")
    suffixes = ("_l0", "_l1") if layered else ("",)
    draws = []
    for suffix in suffixes:
        b_ih, b_hh = (getattr(module, f"bias_{role}{suffix}").detach().chunk(GATES[kind]) for role in ("ih", "hh"))
        u = (b_ih[1] + b_hh[1]).exp()
        assert u.min() >= 1 - 1e-12 and u.max() <= T_max - 1 + 1e-9
        assert u.mean().item() == pytest.approx(T_max / 2, rel=0.1) and u.min() < 2 and u.max() > T_max - 2
        if kind == "LSTM":
            assert (b_ih[0] + b_hh[0]).equal(-(b_ih[1] + b_hh[1]))
        untouched = [2, 3] if kind == "LSTM" else [0, 2]
        for role, new in (("ih", b_ih), ("hh", b_hh)):
            was = getattr(old, f"bias_{role}{suffix}").detach().chunk(GATES[kind])
            equal([new[g] for g in untouched], [was[g] for g in untouched])
        draws.append(u)
    assert len(draws) == 1 or not draws[0].equal(draws[1])
    init.chrono(module, 2)
    assert not getattr(module, f"bias_ih{suffixes[0]}")[H : 2 * H].any()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_chrono_makes_states_last(kind):
    """Gates driven by their biases alone: of a state of one, 1 / (1 + u) is lost at each step, for GRU too."""
    module = init.chrono(cell(kind, 1, 64).double(), 100, generator=seeded())
    with torch.no_grad():
        for weight in (module.weight_ih, module.weight_hh):
            weight.zero_()
        u = module.bias_ih[64:128].exp()
        module.bias_ih[128:192] = module.bias_hh[128:192] = 0.0  # LSTM's g, GRU's n
        x, one = torch.zeros(1, 1).double(), torch.ones(1, 64).double()
        kept = module(x, (one, one))[1] if kind == "LSTM" else module(x, one)
    assert (kept - u / (1 + u)).abs().max() < 1e-14


# ---------------------------------------------------------------------------------------------------- which modules


class Model(nn.Module):
    """Everything at once, one of them shared."""

    def __init__(self):
        super().__init__()
        self.rnns = nn.ModuleDict({"relu": nn.RNN(3, 4, nonlinearity="relu"), "tanh": fastrnn.RNN(3, 4)})
        self.lstm, self.gru = fastrnn.LSTM(3, 4), nn.GRU(3, 4)
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(3, 4), fastrnn.GRUCell(3, 4), fastrnn.RNNCell(3, 4)
        self.again = self.lstm
        self.linear = nn.Linear(4, 2)


LSTMS, GRUS, TANH, RELU = ["lstm", "lstm_cell"], ["gru", "gru_cell"], ["rnns.tanh", "rnn_cell"], ["rnns.relu"]
FUNCTIONS = {
    "xavier": (init.xavier, "weight_ih", LSTMS + GRUS + TANH + RELU),
    "he": (init.he, "weight_ih", RELU),
    "orthogonal": (init.orthogonal, "weight_hh", LSTMS + GRUS + TANH + RELU),
    "identity": (init.identity, ("weight", "bias"), TANH + RELU),
    "forget_bias": (init.forget_bias, "bias", LSTMS),
    "chrono": (lambda m, **k: init.chrono(m, 20, **k), "bias", LSTMS + GRUS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_a_model_what_it_is_for_and_nothing_else(name):
    function, roles, fitting = FUNCTIONS[name]
    found = touched(Model(), function)
    expected = {
        parameter
        for parameter, _ in Model().named_parameters(remove_duplicate=False)
        if any(parameter.startswith(f"{m}.") for m in [*fitting, *(["again"] if "lstm" in fitting else [])])
        and parameter.rsplit(".", 1)[1].startswith(roles)
    }
    assert found == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_it_makes_no_sense_for_is_refused(name):
    function, _, fitting = FUNCTIONS[name]
    for path, module in Model().named_modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and path not in fitting:
            for given in (module, nn.Sequential(module)):
                with pytest.raises(TypeError, match=rf"module: expected an? .*got .*{type(module).__name__}"):
                    function(given)
            assert not touched(module, lambda m: pytest.raises(TypeError, function, m) and m)
    with pytest.raises(TypeError, match="module: expected .*, got one that holds no recurrent module"):
        function(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got list"):
        function([Model()])


def test_subclasses_are_initialised():
    class Mine(nn.LSTM):
        pass

    assert init.forget_bias(Mine(2, 3), 1.0).bias_ih_l0[3:6].eq(1).all()


@pytest.mark.parametrize("function", [init.forget_bias, lambda m: init.chrono(m, 9)], ids=["forget_bias", "chrono"])
@pytest.mark.parametrize("make", [fastrnn.LSTM, fastrnn.LSTMCell])
def test_without_biases(function, make):
    with_biases, without = make(3, 4), make(3, 4, bias=False)
    model = nn.ModuleList([with_biases, without])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"module: expected biases to set, got a {make.__name__} with bias=False"):
        function(model)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())  # all or nothing
    init.orthogonal(init.xavier(without))
    assert init.identity(nn.RNN(3, 4, bias=False)).weight_hh_l0.equal(torch.eye(4))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda m: init.xavier(m, math.inf), ValueError, "gain: expected a finite number, got inf"),
        (lambda m: init.xavier(m, "tanh"), TypeError, "gain: expected a number, got str"),
        (lambda m: init.xavier(m, distribution="cauchy"), ValueError, "distribution: expected .* got 'cauchy'"),
        (lambda m: init.xavier(m, generator=3), TypeError, "generator: expected a torch.Generator, got int"),
        (lambda m: init.orthogonal(m, math.nan), ValueError, "gain: expected a finite number, got nan"),
        (lambda m: init.chrono(m, 1.9), ValueError, "T_max: expected a finite number of at least 2, got 1.9"),
        (lambda m: init.chrono(m, None), TypeError, "T_max: expected a number, got NoneType"),
        (lambda m: init.forget_bias(m, True), TypeError, "value: expected a number, got bool"),
        (lambda m: init.identity(m, input_std=-1), ValueError, "input_std: expected a finite number of at least 0"),
    ],
)
def test_bad_arguments_are_named(call, error, text):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        call(model)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"forget_bias"}))
def test_a_generator_decides_and_the_global_one_is_not_touched(name):
    function = FUNCTIONS[name][0]
    first, second, other = (Model() for _ in range(3))
    second.load_state_dict(first.state_dict())
    before = torch.get_rng_state()
    function(first, generator=seeded(3))
    function(second, generator=seeded(3))
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert touched(first, lambda m: function(m, generator=seeded(4)))
    assert torch.get_rng_state().equal(before)
    function(other)
    assert not torch.get_rng_state().equal(before)
    torch.set_rng_state(before)
    assert not touched(other, function)  # without a generator torch.manual_seed decides


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_seed_means_the_same_weights_in_every_dtype(dtype):
    module = fastrnn.GRU(I, H).to(dtype)
    exact = fastrnn.GRU(I, H).double()
    for m in (module, exact):
        init.chrono(init.orthogonal(init.xavier(m, generator=seeded()), generator=seeded(1)), 9, generator=seeded(2))
    equal([module.weight_ih_l0, module.weight_hh_l0], [exact.weight_ih_l0.to(dtype), exact.weight_hh_l0.to(dtype)])
    assert module.bias_ih_l0[H : 2 * H].equal(exact.bias_ih_l0[H : 2 * H].to(dtype))


# ---------------------------------------------------------------------------------------------------- other weights


def test_gradients_and_identity_of_parameters():
    lstm = fastrnn.LSTM(I, H)
    lstm.weight_ih_l0.requires_grad_(False)
    parameters = list(lstm.parameters())
    init.forget_bias(init.orthogonal(init.xavier(lstm)))
    assert all(a is b for a, b in zip(parameters, lstm.parameters(), strict=True))
    assert [p.requires_grad for p in parameters] == [False, True, True, True]
    assert all(p.is_leaf and p.grad_fn is None for p in parameters)
    lstm(normal(3, 2, I))[0].sum().backward()
    assert lstm.weight_hh_l0.grad is not None


@pytest.mark.parametrize("make", [lambda: fastrnn.LSTM(I, H), lambda: fastrnn.LSTMCell(I, H)], ids=["layer", "cell"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_frozen_module_computes_with_the_new_weights(make, inference):
    x = normal(2, I)
    with torch.inference_mode(inference), torch.no_grad():
        module = make().eval().freeze()
        old = module(x)
        init.forget_bias(module, 3.0)
        assert module.__dict__.get("_frozen") is None
        fresh = make().eval()
        fresh.load_state_dict(module.state_dict())
        equal(module(x), fresh(x))
        assert not module(x)[0].equal(old[0])


@pytest.mark.parametrize("module", [fastrnn, nn], ids=["fastrnn", "torch.nn"])
def test_weight_norm_is_set_through(module):
    gru = parametrizations.weight_norm(module.GRU(I, H), "weight_hh_l0")
    expected = init.orthogonal(module.GRU(I, H), generator=seeded()).weight_hh_l0
    v = gru.parametrizations.weight_hh_l0.original1
    init.orthogonal(gru, generator=seeded())
    assert (gru.weight_hh_l0 - expected).abs().max() < 1e-6
    assert gru.parametrizations.weight_hh_l0.original1 is v and v.requires_grad
    x = normal(4, 2, I)
    plain = module.GRU(I, H)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(getattr(gru, name))
    assert (gru(x)[0] - plain(x)[0]).abs().max() < 1e-6


def test_a_parametrization_that_cannot_have_the_values_is_named_and_left_as_it_was():
    rnn = parametrizations.orthogonal(fastrnn.RNN(I, H), "weight_hh_l0")
    init.orthogonal(rnn)  # that it can
    assert (rnn.weight_hh_l0.t() @ rnn.weight_hh_l0 - torch.eye(H)).abs().max() < 1e-5
    before, expected = (
        copy.deepcopy(rnn.state_dict()),
        "weight_hh_l0: expected a parameter that can be set, got one with a ",
    )
    with pytest.raises(ValueError, match=expected + r"parametrization \(_Orthogonal\) that cannot have the values"):
        init.orthogonal(rnn, 0.5)
    assert all(t.equal(before[name]) for name, t in rnn.state_dict().items())
    cayley = parametrizations.orthogonal(
        fastrnn.RNN(I, H), "weight_hh_l0", orthogonal_map="cayley", use_trivialization=False
    )
    with pytest.raises(ValueError, match=expected + r"parametrization \(_Orthogonal\) that refuses the values: "):
        init.orthogonal(cayley)
    spectral = parametrizations.spectral_norm(fastrnn.RNN(I, H), "weight_hh_l0")
    with pytest.raises(ValueError, match=expected):
        init.orthogonal(spectral, 2.0)


def test_weights_that_a_hook_computes_are_refused():
    pruned = prune.l1_unstructured(fastrnn.RNN(I, H), "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match="weight_hh_l0: expected a parameter, .* computed before each forward"):
        init.orthogonal(pruned)
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.RNN(I, H), "weight_hh_l0")
    model = nn.Sequential(fastrnn.RNN(I, H), old)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="weight_hh_l0: expected a parameter"):
        init.orthogonal(model)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


def test_tied_weights():
    model = nn.ModuleList([fastrnn.LSTM(I, H), fastrnn.LSTM(I, H)])
    for name in ("weight_hh_l0", "bias_ih_l0"):
        setattr(model[1], name, getattr(model[0], name))
    alone = init.orthogonal(fastrnn.LSTM(I, H), generator=seeded())
    init.orthogonal(model, generator=seeded())
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    equal(model[1].weight_hh_l0, alone.weight_hh_l0)  # set once
    init.forget_bias(model, 1.0)
    for lstm in model:
        assert (lstm.bias_ih_l0 + lstm.bias_hh_l0)[H : 2 * H].eq(1).all()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_one_tied_bias_has_half(kind):
    module = build(kind, I, H)
    module.bias_hh_l0 = module.bias_ih_l0
    init.chrono(module, 30, generator=seeded())
    untied = init.chrono(build(kind, I, H), 30, generator=seeded())
    keep = slice(H, 2 * H)
    assert (2 * module.bias_ih_l0[keep]).equal(untied.bias_ih_l0[keep])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta(name):
    with torch.device("meta"):
        model = Model()
        FUNCTIONS[name][0](model)
    assert all(p.is_meta for p in model.parameters())
    with torch.device("meta"):  # real tensors under a meta default
        real = init.forget_bias(init.orthogonal(nn.LSTM(I, H, device="cpu")))
    assert (real.weight_hh_l0[:H].t() @ real.weight_hh_l0[:H] - torch.eye(H, device="cpu")).abs().max() < 1e-5


def test_a_cell_without_input_features():
    """torch.nn's cells allow that."""
    init.xavier(nn.GRUCell(0, 3))
    init.he(nn.RNNCell(0, 3, nonlinearity="relu"))
