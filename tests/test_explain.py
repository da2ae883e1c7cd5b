"""explain and build_info: they tell what the call then does, and compute nothing."""

import fastrnn._C as _C
import pytest
import torch
from torch import nn

import fastrnn

KERNEL = "fastrnn cpu kernel"


def ran(module, *args, **kwargs):
    """Whether the call ran fastrnn's operator."""
    with torch.profiler.profile() as profile:
        module(*args, **kwargs)
    return any(event.name == "fastrnn::layer" for event in profile.events())


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
    module, x = fastrnn.GRU(5, 7), torch.randn(6, 4, 5)

    def path(*args, **kwargs):
        return fastrnn.explain(module, *args, **kwargs).path

    assert path(x) == KERNEL
    assert path(x, lengths=torch.tensor([6, 5, 2, 1]), all_states=True) == KERNEL
    assert path(torch.randn(6, 4, 6)) == "torch"  # and torch raises
    with torch.autograd.forward_ad.dual_level():
        assert path(x) == "torch"
        assert path(x, all_states=True) == "reference"
    seen = []
    torch.func.vmap(lambda v: seen.append(path(v)) or v)(torch.randn(3, 6, 4, 5))
    assert seen == ["torch"]


def test_autocast_is_explained():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastrnn.explain(fastrnn.LSTM(5, 7), torch.randn(6, 4, 5)).dtype == torch.bfloat16
        assert fastrnn.explain(fastrnn.GRU(5, 7), torch.randn(6, 4, 5)).dtype == torch.float32


def test_explain_computes_nothing():
    module = fastrnn.GRU(5, 7)
    module.weight_ih_l0.data.fill_(torch.nan)
    with torch.profiler.profile() as profile:
        fastrnn.explain(module, torch.randn(6, 4, 5))
    assert not any(event.name == "fastrnn::layer" for event in profile.events())


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match="module: expected an RNN, LSTM, GRU or a cell of one, got Linear"):
        fastrnn.explain(nn.Linear(5, 7), torch.randn(4, 5))


def test_build_info():
    info = fastrnn.build_info()
    for key in ("version", "torch", "torch_running", "compiler", "cuda_architectures", "isas", "available", "isa"):
        assert key in info
    assert info["version"] == fastrnn.__version__
    assert info["torch_running"] == torch.__version__
    assert info["isa"] == _C.isa() == info["available"][-1]
    assert set(info["available"]) <= set(info["isas"])
    assert "scalar" in info["available"]
    assert info["available"] == list(_C.isas())
