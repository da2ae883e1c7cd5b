"""CUDA tensors without a card: who computes a call, in what dtypes and why, on tensors without data (FakeTensorMode);
and the whole stack, modules to kernels, on a CUDA device made of host memory with emulated kernels (emulated.py)."""

import os
import re
import subprocess
import sys

import fastrnn._C as _C
import pytest
import torch
from conftest import DTYPES, KINDS, build, dtype_name
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import ops, plan

PATHS = ["step", "block", "cluster", "grid", "auto"]
T, B, I, H = 6, 3, 4, 5


@pytest.fixture
def fake():
    """Tensors without data, on whatever device they say."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


@pytest.fixture
def built(monkeypatch):
    """A build that has CUDA kernels, and no path forced."""
    monkeypatch.setattr(plan, "CUDA_BUILT", True)
    monkeypatch.setattr(plan, "_gpu_path", lambda: "")


@pytest.fixture
def forced(built, monkeypatch):
    monkeypatch.setattr(plan, "_gpu_path", lambda: "step")


def empty(*shape, dtype=torch.float32, device="cuda"):
    return torch.empty(*shape, dtype=dtype, device=device)


def on_gpu(module, dtype=torch.float32):
    """Its weights replaced by some that say they are on a GPU."""
    for name, p in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(empty(*p.shape, dtype=dtype)))
    return module


def route(form=plan.DENSE, cell="gru", dtype=torch.float32, extended=False, h0=None, weights=None, **input):
    gates = ops.CELLS[cell]["gates"]
    if weights is None:
        weights = [empty(gates * H, I, dtype=dtype), empty(gates * H, H, dtype=dtype)]
    x = empty(*((B, I) if form is plan.STEP else (T, B, I)), **{"dtype": dtype, **input})
    return plan.plan(cell, x, h0, None, weights, form, extended)


class Operators(TorchDispatchMode):
    """Which of fastrnn's operators ran, with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastrnn":
            self.calls.append((function._schema.name.removeprefix("fastrnn::"), args))
        return function(*args, **(kwargs or {}))

    @property
    def names(self):
        return [name for name, _ in self.calls]


# --------------------------------------------------------------------------------------------------------- routes


def test_a_build_without_cuda_leaves_them_to_torch(fake, monkeypatch):
    monkeypatch.setattr(plan, "CUDA_BUILT", False)
    monkeypatch.setattr(plan, "_gpu_path", lambda: "step")
    assert route()[:2] == (plan.TORCH, "this build has no CUDA kernels")


@pytest.mark.parametrize("extended", [False, True])
def test_nothing_unchecked_runs_by_itself(fake, built, extended):
    found = route(extended=extended)
    assert found.path is (plan.REFERENCE if extended else plan.TORCH)
    assert "no CUDA kernel has been checked on a card yet; FASTRNN_GPU_PATH=step" in found.reason


def test_torch_may_be_forced(fake, built, monkeypatch):
    monkeypatch.setattr(plan, "_gpu_path", lambda: "torch")
    assert route()[:2] == (plan.TORCH, "FASTRNN_GPU_PATH=torch leaves CUDA tensors to torch")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_forced_path_takes_the_dtypes_of_the_kernels(fake, built, monkeypatch, path, dtype):
    monkeypatch.setattr(plan, "_gpu_path", lambda: path)
    for extended in (False, True):
        found = route(dtype=dtype, extended=extended)
        assert found.path is plan.KERNEL and not found.cast and (found.work, found.h, found.c) == (dtype,) * 3
        assert found.reason == f"FASTRNN_GPU_PATH={path} takes {dtype_name(dtype)} on a GPU to fastrnn's kernels"
    # The CPU does not ask.
    assert "on the CPU" in route(dtype=dtype, device="cpu", weights=[]).reason


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda: dict(dtype=torch.complex64), "no kernel for dtype torch.complex64"),
        (lambda: dict(weights=[empty(3 * H, I, device="cpu")]), "devices of the arguments differ: cuda:0 and cpu"),
        (lambda: dict(h0=empty(1, B, H, device="cuda:1")), "devices of the arguments differ: cuda:0 and cuda:1"),
        (lambda: dict(device="cpu"), "devices of the arguments differ: cpu and cuda:0"),
        (lambda: dict(h0=empty(1, B, H, dtype=torch.float64)), "dtypes of the arguments differ"),
    ],
)
def test_what_the_kernels_do_not_take(fake, forced, given, reason):
    found = route(**given())
    assert found.path is plan.TORCH and reason in found.reason


def test_other_devices_have_no_kernels(fake, forced):
    assert "no kernel for device xpu" in route(device="xpu").reason


@pytest.mark.parametrize("kind", KINDS)
def test_modules_run_the_operators(fake, forced, kind):
    module = on_gpu(build(kind, I, H, num_layers=2, bidirectional=True, batch_first=True))
    with Operators() as ran:
        output, hx = module(empty(B, T, I), reset=empty(B, T, dtype=torch.bool))
    assert ran.names == ["stack"] and output.device.type == "cuda" and output.stride() == (T * 2 * H, 2 * H, 1)
    module.dropout = 0.5
    with Operators() as ran:
        module(empty(B, T, I), lengths=empty(B, dtype=torch.int32), all_states=True)
    assert ran.names == ["layer", "layer"]


@pytest.mark.parametrize("cell", [fastrnn.RNNCell, fastrnn.GRUCell, fastrnn.LSTMCell])
def test_cells_run_their_operator(fake, forced, cell):
    with Operators() as ran:
        on_gpu(cell(I, H))(empty(B, I))
    assert ran.names == ["step"]


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("setting", "expected"), [("tf32", ops.TF32), ("ieee", ops.EXACT), ("none", ops.EXACT)])
def test_float32_products_are_what_torchs_switch_allows(fake, forced, setting, expected):
    switch = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    switch.fp32_precision = setting
    try:
        module = on_gpu(fastrnn.GRU(I, H))
        with Operators() as ran:
            module(empty(T, B, I))
            on_gpu(fastrnn.GRUCell(I, H))(empty(B, I))
            on_gpu(fastrnn.GRU(I, H), torch.bfloat16)(empty(T, B, I, dtype=torch.bfloat16))
        layer, step, low = (args for _, args in ran.calls)
        assert (layer[12:13] or (0,)) == (step[6:7] or (0,)) == (expected,) and (low[12:13] or (0,)) == (ops.EXACT,)
        assert ("TensorFloat-32" in fastrnn.explain(module, empty(T, B, I)).why) == (expected == ops.TF32)
    finally:
        switch.fp32_precision = before


def test_the_older_switch_is_the_same():
    """In a process of its own: torch cannot be brought back to where no switch was ever set."""
    code = (
        "import torch; from fastrnn import plan; print(plan.precision(torch.float32, True))\n"
        "torch.backends.cudnn.allow_tf32 = False; print(plan.precision(torch.float32, True))\n"
        "torch.backends.cudnn.allow_tf32 = True; print(plan.precision(torch.float32, True))\n"
        "print(plan.precision(torch.float64, True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == [ops.TF32, ops.EXACT, ops.TF32, ops.EXACT]


# -------------------------------------------------------------------------------------------------------- autocast


@pytest.fixture
def autocast():
    def enable(dtype):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)

    before = torch.get_autocast_dtype("cuda")
    yield enable
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_autocast_casts_everything(fake, forced, autocast, monkeypatch, cell, cudnn, low):
    """To its dtype; cuDNN's RNNs, but not the cells, to float16 whatever it is."""
    monkeypatch.setattr(plan, "_cudnn_enabled", lambda: cudnn)
    autocast(low)
    for form in (plan.DENSE, plan.PACKED, plan.STEP):
        expected = torch.float16 if cudnn and form is not plan.STEP else low
        found = route(form, cell)
        assert found.path is plan.KERNEL and found.cast
        assert (found.work, found.h, found.c) == (expected,) * 3
    # What one such module returns is what the next one is given.
    assert route(plan.DENSE, cell, dtype=expected, weights=[empty(H, I), empty(H, H)]).path is plan.KERNEL


@pytest.mark.parametrize(("version", "expected"), [(91200, torch.bfloat16), (91300, torch.float16)])
def test_cudnn_takes_bfloat16_from_its_version_9_13_on(fake, forced, autocast, monkeypatch, version, expected):
    monkeypatch.setattr(plan, "_cudnn_enabled", lambda: True)
    monkeypatch.setattr(plan, "_cudnn_version", lambda: version)
    autocast(torch.bfloat16)
    assert route(dtype=torch.bfloat16).work == expected


def test_autocast_leaves_float64_alone(fake, forced, autocast):
    autocast(torch.float16)
    assert route(dtype=torch.float64).work == torch.float64 and not route(dtype=torch.float64).cast


def test_autocast_of_projections(fake, forced, autocast):
    autocast(torch.bfloat16)
    output, (h, c) = on_gpu(fastrnn.LSTM(I, H, proj_size=2))(empty(T, B, I))
    assert {output.dtype, h.dtype, c.dtype} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------- explain, and the switch


def test_explain(fake, forced):
    found = fastrnn.explain(on_gpu(fastrnn.LSTM(I, H, 2)), empty(T, B, I))
    assert (found.path, found.dtype, found.isa, found.threads) == ("fastrnn cuda kernel", torch.float32, None, None)
    assert "FASTRNN_GPU_PATH=step" in found.why and len(found.splits) == 2
    assert all(text.startswith("step, ") for text in found.splits)
    assert fastrnn.explain(on_gpu(fastrnn.GRUCell(I, H)), empty(B, I)).path == "fastrnn cuda kernel"
    nothing = fastrnn.explain(on_gpu(fastrnn.GRU(I, H)), empty(T, 0, I))
    assert nothing.splits == ("no rows, nothing to compute",)


def test_explain_by_default(fake, built):
    found = fastrnn.explain(on_gpu(fastrnn.GRU(I, H)), empty(T, B, I))
    assert found.path == "torch" and "FASTRNN_GPU_PATH" in found.why and found.splits == ()


@pytest.mark.parametrize("path", PATHS[1:])
def test_the_plan_for_a_card(path):
    """That of an H100, for what it can do and for what it hands to the step path."""
    card = (90, 132, 232448)
    _C.set_gpu_path(path)
    try:
        found = _C.gpu_plan("gru", "bfloat16", False, False, 100, 16, 64, 64, 64, 1, card)
        assert found["path"] == path or path == "auto" and found["path"] != "step"
        assert found["blocks"] * found["units"] >= 64 and found["groups"] * found["rows"] >= 16
        step = _C.gpu_plan("gru", "float64", False, False, 100, 16, 64, 64, 64, 1, card)
        assert step["path"] == "step" and "float64" in step["why"]
    finally:
        _C.set_gpu_path("")
    with pytest.raises(ValueError, match="dtype: expected 'float32', .* got 'int8'"):
        _C.gpu_plan("gru", "int8", False, False, 100, 16, 64, 64, 64, 1, card)


def test_the_switch():
    assert _C.gpu_paths() == [*PATHS, "torch"]
    before = _C.gpu_path()
    for path in _C.gpu_paths():
        _C.set_gpu_path(path)
        assert fastrnn.build_info()["gpu_path"] == _C.gpu_path() == path
    _C.set_gpu_path("")
    assert _C.gpu_path() == before
    with pytest.raises(ValueError, match="path: expected one of 'step', .*'torch', or '' for the default, got 'warp'"):
        _C.set_gpu_path("warp")


@pytest.mark.parametrize(("value", "path", "rejected"), [("grid", "grid", None), ("", "", None), ("GRID", "", "GRID")])
def test_the_environment(value, path, rejected):
    code = "import fastrnn; i = fastrnn.build_info(); print(repr(i['gpu_path']), i['rejected_gpu_path'])"
    environment = {**os.environ, "FASTRNN_GPU_PATH": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{path!r} {rejected}"
    warning = "FASTRNN_GPU_PATH: expected one of step, block, cluster, grid, auto, torch, got 'GRID'; using the default"
    assert (warning in done.stderr) == (rejected is not None)


# ----------------------------------------------------------------------------------------------------- the whole stack


@pytest.mark.long
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA itself, which leaves no place for another")
def test_on_an_emulated_gpu(tmp_path):
    import emulated

    done = emulated.run_tests(emulated.build(tmp_path), "cases_on_cuda.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50
