"""explain and build_info: they tell what the call then does, and compute nothing."""

import fastrnn._C as _C
import pytest
import torch
from conftest import DEFAULT_ISA
from torch import nn

import fastrnn

KERNEL = "fastrnn cpu kernel"


def ran(module, *args, **kwargs):
    """Whether the call ran fastrnn's operator."""
    with torch.profiler.profile() as profile:
        module(*args, **kwargs)
    return any(event.name in ("fastrnn::layer", "fastrnn::step") for event in profile.events())


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernels_serve_every_cell_and_dtype(name, dtype, isa):
    module = getattr(fastrnn, name)(5, 7, dtype=dtype)
    x = torch.randn(4, 5, dtype=dtype)
    plan = fastrnn.explain(module, x)
    assert isinstance(plan, fastrnn.Plan)
    assert (plan.path, plan.isa, plan.dtype, plan.threads) == (KERNEL, isa, dtype, torch.get_num_threads())
    assert plan.cell.split("_")[0] == name.removesuffix("Cell").lower()
    assert ran(module, x)
    text = str(plan)
    for part in (KERNEL, plan.cell, isa, "H = 7", "I = 5"):
        assert part in text


def test_layers_are_listed():
    plan = fastrnn.explain(fastrnn.LSTM(5, 7, 3, bidirectional=True, proj_size=2), torch.randn(6, 4, 5))
    assert len(plan.layers) == 3
    assert [layer["I"] for layer in plan.layers] == [5, 4, 4]
    assert all(layer["T"] == 6 and layer["B"] == 4 and layer["D"] == 2 and layer["P"] == 2 for layer in plan.layers)


@pytest.fixture
def split():
    """The switch that forces a way of sharing out; put back afterwards."""
    yield _C.set_split
    _C.set_split("")


def test_how_a_layer_is_shared_out_in_words(split):
    plan = fastrnn.explain
    torch.set_num_threads(1)
    (text,) = plan(fastrnn.GRU(40, 40), torch.randn(100, 32, 40)).splits
    assert text.startswith("one thread; limit: ")
    torch.set_num_threads(2)
    if _C.split("gru", False, 100, 32, 40, 40, 40, 1, 2)["slices"] == 1:
        pytest.skip("the CPU quota of this process is one core: nothing is ever shared out")
    found = plan(fastrnn.LSTM(40, 40, 2), torch.randn(100, 32, 40))
    assert len(found.splits) == 2
    assert all(text.startswith("2 slices of the batch; limit: ") for text in found.splits)
    lines = str(found).splitlines()
    assert lines[-2] == f"  layer 0: T = 100, B = 32, I = 40, H = 40, D = 1: {found.splits[0]}"
    assert lines[-1] == f"  layer 1: T = 100, B = 32, I = 40, H = 40, D = 1: {found.splits[1]}"

    for name, module, expected in (
        ("serial", fastrnn.LSTM(9, 200), "one thread"),
        ("batch", fastrnn.LSTM(9, 200), "2 slices of the batch"),
        ("hidden", fastrnn.LSTM(9, 200), "2 parts of the hidden units, meeting after each step"),
        ("hidden", fastrnn.LSTM(9, 200, proj_size=70), "2 parts of the hidden units, meeting after each step"),
        ("hidden", fastrnn.RNN(9, 200, bidirectional=True), "directions side by side"),
    ):
        split(name)
        assert plan(module, torch.randn(12, 6, 9)).splits[0].split(";")[0] == expected


def test_every_way_of_sharing_out_has_its_words(monkeypatch):
    """Also those that take more threads than this machine may have."""

    def words(directions, slices, parts, ahead=False):
        found = {"directions": directions, "slices": slices, "parts": parts, "ahead": ahead, "limit": "arithmetic"}
        monkeypatch.setattr(_C, "split", lambda *arguments: found)
        return fastrnn.explain(fastrnn.GRU(5, 7), torch.randn(6, 4, 5)).splits[0]

    hidden = "parts of the hidden units, meeting after each step"
    assert words(1, 1, 1) == "one thread; limit: arithmetic"
    assert words(1, 3, 1) == "3 slices of the batch; limit: arithmetic"
    assert words(1, 1, 4) == f"4 {hidden}; limit: arithmetic"
    assert words(1, 2, 3) == f"2 slices of the batch x 3 {hidden}; limit: arithmetic"
    assert words(2, 1, 1) == "directions side by side; limit: arithmetic"
    assert words(2, 2, 1) == "directions side by side, each in 2 slices of the batch; limit: arithmetic"
    assert words(2, 1, 2) == f"directions side by side, each in 2 {hidden}; limit: arithmetic"
    ahead = "to project its input ahead; limit: arithmetic"
    assert words(1, 1, 1, True) == f"one thread for the recurrence, another {ahead}"
    assert words(1, 2, 1, True) == f"2 slices of the batch, each with a thread more {ahead}"
    assert words(2, 1, 1, True) == f"directions side by side, each with a thread more {ahead}"


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "LSTM projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_model_is_asked_about_the_layer_that_would_run(kind, dtype, monkeypatch):
    asked = []
    real = _C.split
    monkeypatch.setattr(_C, "split", lambda *arguments: asked.append(arguments) or real(*arguments))
    kind, *projected = kind.split()
    extra = {"proj_size": 3} if projected else {}
    module = getattr(fastrnn, kind)(5, 7, 2, bidirectional=True, batch_first=True, dtype=dtype, **extra)
    cell, wide, P, threads = kind.lower() + "_tanh" * (kind == "RNN"), dtype == torch.float64, 3 if projected else 7, 2
    torch.set_num_threads(threads)
    x = torch.randn(4, 6, 5, dtype=dtype)
    exact, narrow = 0, dtype == torch.bfloat16
    expected = [(cell, wide, 6, 4, width, 7, P, 2, threads, 1, False, narrow, exact) for width in (5, 2 * P)]
    as_wavefront = (*expected[0][:9], 2, False, narrow, exact)
    packed = nn.utils.rnn.pack_padded_sequence(x, [6, 1, 3, 2], batch_first=True, enforce_sorted=False)
    for input, options in ((x, {}), (packed, {}), (x, {"lengths": torch.tensor([6, 1, 3, 2])})):
        asked.clear()
        plan = fastrnn.explain(module, input, **options)
        # Where rows are equally long, also whether the two layers would be a wavefront.
        assert asked == (expected if options or input is packed else [as_wavefront, *expected])
        assert len(plan.splits) == 2
        assert [list(layer) for layer in plan.layers] == [[*"TBIH", *"P" * len(projected), "D"]] * 2
    if not projected:
        asked.clear()
        cell_module = getattr(fastrnn, kind + "Cell")(5, 7, dtype=dtype)
        assert len(fastrnn.explain(cell_module, x[0]).splits) == 1
        assert asked == [(cell, wide, 1, 6, 5, 7, 7, 1, threads, 1, False, narrow, exact)]
        assert "layer 0: T = 1, B = 6, I = 5, H = 7: " in str(fastrnn.explain(cell_module, x[0]))


def test_where_no_kernel_runs_nothing_is_shared_out():
    plan = fastrnn.explain(nn.GRU(5, 7, 2), torch.randn(6, 4, 5))
    assert plan.splits == ()
    assert str(plan).splitlines()[-1] == "  layer 1: T = 6, B = 4, I = 7, H = 7, D = 1"
    assert fastrnn.explain(fastrnn.GRU(5, 7), torch.randn(6, 4, 8)).splits == ()
    assert fastrnn.explain(fastrnn.GRU(5, 7), torch.randn(6, 0, 5)).splits == ("no rows, nothing to compute",)


def test_plans_are_values():
    plan = fastrnn.explain(fastrnn.GRU(5, 7), torch.randn(6, 4, 5))
    assert plan == fastrnn.explain(fastrnn.GRU(5, 7), torch.randn(6, 4, 5))
    with pytest.raises(AttributeError):
        plan.splits = ()


def test_torchs_own_module_runs_torch_until_patched():
    module, x = nn.GRU(5, 7), torch.randn(6, 4, 5)
    assert fastrnn.explain(module, x).path == "torch"
    assert not ran(module, x)
    with fastrnn.patch():
        assert fastrnn.explain(module, x).path == KERNEL
        assert ran(module, x)
    assert fastrnn.explain(fastrnn.accelerate(module), x).path == KERNEL
    assert ran(module, x)


def test_the_reasons_for_torch():
    module, cell, x = fastrnn.GRU(5, 7), fastrnn.GRUCell(5, 7), torch.randn(6, 4, 5)

    def path(*args, **kwargs):
        return fastrnn.explain(module, *args, **kwargs).path

    assert path(x) == KERNEL
    assert path(x, lengths=torch.tensor([6, 5, 2, 1]), all_states=True) == KERNEL
    assert path(torch.randn(6, 4, 6)) == "torch"  # and torch raises
    with torch.autograd.forward_ad.dual_level():
        assert path(x) == path(x, all_states=True) == "reference"
    seen = []

    def look(v):
        plans = fastrnn.explain(module, v), fastrnn.explain(cell, v[0])
        seen.extend((plan.path, plan.isa) for plan in plans)
        return v.sum()

    torch.func.vmap(torch.func.grad(look))(torch.randn(3, 6, 4, 5))
    assert seen == [("fastrnn cpu kernel, transformed", fastrnn.build_info()["isa"])] * 2
    seen.clear()
    torch.func.jvp(look, (x,), (x,))
    assert seen == [("reference", None)] * 2


def test_autocast_is_explained():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastrnn.explain(fastrnn.LSTM(5, 7), torch.randn(6, 4, 5)).dtype == torch.bfloat16
        assert fastrnn.explain(fastrnn.GRU(5, 7), torch.randn(6, 4, 5)).dtype == torch.float32


def test_explain_computes_nothing():
    module = fastrnn.GRU(5, 7)
    module.weight_ih_l0.data.fill_(torch.nan)
    with torch.profiler.profile() as profile:
        fastrnn.explain(module, torch.randn(6, 4, 5))
    assert not any(event.name.startswith("fastrnn::") for event in profile.events())


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="module: expected an RNN, LSTM, GRU or a cell of one, got Linear"):
        fastrnn.explain(nn.Linear(5, 7), torch.randn(4, 5))


def test_build_info():
    info = fastrnn.build_info()
    for key in ("version", "torch", "torch_running", "compiler", "cuda_architectures", "isas", "available", "isa"):
        assert key in info
    assert info["version"] == fastrnn.__version__
    assert info["torch_running"] == torch.__version__
    assert info["isa"] == _C.isa() == DEFAULT_ISA
    assert set(info["available"]) <= set(info["isas"])
    assert "scalar" in info["available"]
    assert info["available"] == list(_C.isas())
