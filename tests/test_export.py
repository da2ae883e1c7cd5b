"""Models that leave the process: torch.export, AOTInductor (in Python, and in a C++ program without it), script, ONNX.

What runs on fastrnn's operators is compared bit for bit, in every process: they are the same kernels.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, equal, pair, tensors_in
from torch import nn
from torch.utils.cpp_extension import include_paths, library_paths

import fastrnn
import fastrnn.functional as F

OPS = Path(fastrnn.__file__).with_name("_ops.so")
SHAPES = [(6, 4), (9, 3), (1, 4), (5, 1), (1, 1), (3, 0), (40, 33)]  # T, B; the first is the one that is exported


class Model(nn.Module):
    """An RNN between two linear layers, with all that varies from call to call as inputs."""

    def __init__(self, kind, all_states=False, **options):
        super().__init__()
        self.all_states = all_states
        self.encoder = nn.Linear(5, 6)
        self.rnn = build(kind, 6, 7, **options)
        self.head = nn.Linear(7 * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x, hx, reset, lengths):
        output, *hidden = self.rnn(self.encoder(x), hx, reset=reset, lengths=lengths, all_states=self.all_states)
        return self.head(output), output, hidden


class Functional(Model):
    """The same by fastrnn.functional."""

    def forward(self, x, hx, reset, lengths):
        rnn, call = self.rnn, F.lstm if self.rnn.mode == "LSTM" else F.gru
        weights = rnn._flat_weights
        output, *hidden = call(
            self.encoder(x), hx, weights, True, rnn.num_layers, 0.0, False, rnn.bidirectional, rnn.batch_first,
            reset=reset, lengths=lengths, all_states=self.all_states,
        )  # fmt: skip
        return self.head(output), output, hidden


class Step(nn.Module):
    """A cell, for streams."""

    def __init__(self):
        super().__init__()
        self.cell = fastrnn.LSTMCell(5, 7)

    def forward(self, x, hx):
        return self.cell(x, hx)


def inputs(model, T, B):
    rnn = model.rnn
    shape, layers = (B, T) if rnn.batch_first else (T, B), rnn.num_layers * (2 if rnn.bidirectional else 1)
    states = [torch.randn(layers, B, 7) for _ in range(2 if rnn.mode == "LSTM" else 1)]
    hx = tuple(states) if rnn.mode == "LSTM" else states[0]
    return torch.randn(*shape, 5), hx, torch.rand(*shape) < 0.3, torch.randint(0, T + 1, (B,))


def export(model, strict):
    """With T and B to be chosen later, 1 and an empty batch among them. Without Dynamo's flag allow_rnn: where export
    asks Dynamo, it sets the flag itself."""
    T, B = torch.export.Dim("T", min=1), torch.export.Dim("B", min=0)
    sequence = {0: B, 1: T} if model.rnn.batch_first else {0: T, 1: B}
    state = ({1: B}, {1: B}) if model.rnn.mode == "LSTM" else {1: B}
    shapes = (sequence, state, sequence, {0: B})
    return torch.export.export(model.eval(), inputs(model, *SHAPES[0]), dynamic_shapes=shapes, strict=strict)


def operator(program):
    """The one operator of fastrnn's in the graph, and its arguments by name."""
    (node,) = (node for node in program.graph.nodes if "fastrnn" in str(node.target))
    return str(node.target), dict(zip((a.name for a in node.target._schema.arguments), node.args))


# torch.export.


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "kind, options, expected",
    [
        ("LSTM", dict(num_layers=2, bidirectional=True), "stack"),
        ("LSTM", dict(all_states=True, batch_first=True), "layer"),
        ("GRU", dict(num_layers=2, batch_first=True), "stack"),
        ("RNN_TANH", dict(bidirectional=True, all_states=True), "layer"),
        ("RNN_RELU", dict(), "layer"),
    ],
)
def test_modules_are_exported_for_all_shapes(kind, options, expected, strict):
    model = Model(kind, **options)
    program = export(model, strict)
    name, given = operator(program)
    assert name == f"fastrnn.{expected}.default"
    # Parameters want gradients here, and export keeps no backward: no tape is written for it.
    assert given["saved_from"] == given["num_layers"] if expected == "stack" else given["save"] is False
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        for T, B in SHAPES:
            given = inputs(model, T, B)
            equal(exported(*given), model(*given))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_functional_is_exported_for_all_shapes(kind, strict):
    model = Functional(kind, num_layers=2, bidirectional=True)
    exported = export(model, strict).module()
    for T, B in SHAPES:
        given = inputs(model, T, B)
        equal(exported(*given), model(*given))


@pytest.mark.parametrize("strict", [True, False])
def test_gradients_end_at_exported_operators_with_a_warning(strict):
    model = Model("GRU")
    exported = export(model, strict).module()
    output = exported(*inputs(model, 6, 4))[0]
    with pytest.warns(UserWarning, match="fastrnn::layer: an autograd kernel was not registered"):
        output.sum().backward()
    assert exported.head.weight.grad is not None
    assert exported.rnn.weight_hh_l0.grad is None


def test_frozen_modules_are_exported_as_others():
    """What freeze() keeps is for this machine."""
    model = Model("GRU").eval()
    model.rnn.freeze()
    program = export(model, strict=False)
    assert operator(program)[0] == "fastrnn.layer.default"
    given = inputs(model, 9, 3)
    equal(program.module()(*given), model(*given))


def test_exported_programs_refuse_what_does_not_fit():
    model = Model("GRU")
    exported = export(model, strict=False).module()
    x, hx, reset, lengths = inputs(model, 6, 4)
    with pytest.raises(RuntimeError, match="lengths: expected values from 0 to T = 6, got 7 for row 0"):
        exported(x, hx, reset, lengths.new_full((4,), 7))
    with pytest.raises(AssertionError, match="reset"):
        exported(x, hx, reset[:5], lengths)


@pytest.mark.slow
def test_exported_programs_run_in_another_process(tmp_path):
    model = Model("LSTM", num_layers=2, bidirectional=True)
    torch.export.save(export(model, strict=False), tmp_path / "model.pt2")
    given = [inputs(model, T, B) for T, B in SHAPES]
    torch.save(given, tmp_path / "inputs.pt")
    code = """
import torch, fastrnn
model = torch.export.load("model.pt2").module()
torch.save([model(*given) for given in torch.load("inputs.pt")], "outputs.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
    equal(torch.load(tmp_path / "outputs.pt"), [model(*g) for g in given])


def environment():
    """Products outside of fastrnn may depend on the number of threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


# AOTInductor.

PACKAGES = {
    "LSTM": lambda: Model("LSTM", num_layers=2, bidirectional=True),
    "GRU": lambda: Model("GRU", batch_first=True, all_states=True),
    "LSTMCell": Step,
}


@pytest.fixture(scope="module", params=PACKAGES)
def package(request, tmp_path_factory):
    """A model and the file that it was compiled to."""
    torch.manual_seed(5)
    model = PACKAGES[request.param]().eval()
    if isinstance(model, Step):
        B = {0: torch.export.Dim("B", min=1)}
        program = torch.export.export(model, arguments_of(model, 1, 4), dynamic_shapes=(B, (B, B)))
    else:
        program = export(model, strict=False)
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    with torch._inductor.config.patch(fx_graph_cache=False):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return model, path


def arguments_of(model, T, B):
    if isinstance(model, Step):
        return torch.randn(B, 5), (torch.randn(B, 7), torch.randn(B, 7))
    return inputs(model, T, B)


@pytest.mark.slow
def test_compiled_packages_in_python(package):
    model, path = package
    loaded = torch._inductor.aoti_load_package(str(path))
    for T, B in SHAPES:
        given = arguments_of(model, T, B)
        with torch.no_grad():
            equal(loaded(*given), model(*given))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/csrc/run_exported.cpp, compiled. _ops.so wants libtorch.so too, which the linker would leave out."""
    path, (libraries, *_) = tmp_path_factory.mktemp("program") / "run_exported", library_paths()
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}",
        *(f"-isystem{folder}" for folder in include_paths()),
        Path(__file__).parent / "csrc" / "run_exported.cpp", "-o", path,
        f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return path


@pytest.mark.slow
def test_compiled_packages_in_a_program_without_python(package, program, tmp_path):
    model, path = package
    files, expected = [], []
    for k, (T, B) in enumerate(SHAPES):
        given = arguments_of(model, T, B)
        files += [tmp_path / f"{k}.in", tmp_path / f"{k}.out"]
        torch.save(tensors_in(given), files[-2])
        with torch.no_grad():
            expected.append(tensors_in(model(*given)))
    done = subprocess.run([program, OPS, path, *files], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    equal([torch.load(file) for file in files[1::2]], expected)
    libraries = [line.rsplit("/", 1)[-1] for line in done.stdout.splitlines()]
    assert {"_ops.so", "libtorch_cpu.so"} <= set(libraries)
    assert not [name for name in libraries if "python" in name.lower()], libraries


@pytest.mark.slow
@pytest.mark.parametrize("package", ["LSTM"], indirect=True)
def test_a_program_hears_what_is_wrong(package, program, tmp_path):
    model, path = package
    x, hx, reset, lengths = inputs(model, 6, 4)

    def run(operators, *given):
        torch.save(tensors_in(given), tmp_path / "in")
        command = [program, operators, path, tmp_path / "in", tmp_path / "out"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        return done.returncode, done.stderr

    assert run(OPS, x, hx, reset, lengths) == (0, "")
    code, text = run(OPS, x, hx, reset, lengths.new_tensor([1, 2, 7, 3]))
    assert code == 1 and "lengths: expected values from 0 to T = 6, got 7 for row 2" in text
    code, text = run(OPS, x, hx, reset[:5], lengths)
    assert code == 1 and "reset: expected shape" in text
    code, text = run(Path(torch.__file__).parent / "lib" / "libc10.so", x, hx, reset, lengths)
    assert code == 1 and "fastrnn::stack" in text
    code, text = run(tmp_path / "nothing.so", x, hx, reset, lengths)
    assert code == 1 and "nothing.so" in text


# torch.jit.script, torch.jit.trace, ONNX: torch's operators.


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_scripting_gives_torchs_twin(kind):
    ours, theirs = pair(kind, 5, 7, num_layers=2)
    x = torch.randn(6, 4, 5)
    model = nn.Sequential(nn.Linear(5, 5), ours)
    twin = nn.Sequential(model[0], theirs)
    scripted = torch.jit.script(model)
    equal(scripted(x), twin(x))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    equal(torch.jit.load(file)(x), twin(x))
    assert "fastrnn::" not in str(scripted.inlined_graph)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_scripted_cells(name):
    cell = getattr(fastrnn, name)(5, 7)
    theirs = getattr(nn, name)(5, 7)
    theirs.load_state_dict(cell.state_dict())
    x = torch.randn(4, 5)
    equal(torch.jit.script(cell)(x), theirs(x))


@pytest.mark.filterwarnings("ignore")
def test_tracing_records_torchs_operators():
    ours, theirs = pair("GRU", 5, 7)
    x = torch.randn(6, 4, 5)
    traced = torch.jit.trace(ours, x)
    equal(traced(x), theirs(x))
    assert "fastrnn::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_export(kind):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    onnx = pytest.importorskip("onnx", reason="the exported file is read with onnx")
    rnn, x = build(kind, 5, 7, batch_first=False).eval(), torch.randn(6, 4, 5)
    program = torch.onnx.export(rnn, (x,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    domains = {node.domain for node in program.model_proto.graph.node}
    assert domains <= {"", "pkg.onnxscript.torch_lib", "pkg.onnxscript.torch_lib.common", "pkg.torch.ops.aten"}
    theirs = build(kind, 5, 7, module=nn).eval()
    theirs.load_state_dict(rnn.state_dict())
    for a, b in zip(tensors_in(rnn(x)), tensors_in(theirs(x)), strict=True):  # on fastrnn again, as before
        assert (a - b).norm() <= 1e-6 * b.norm()
