"""torch.compile, export, script and ONNX: one graph where promised, right numbers everywhere."""

import io

import pytest
import torch
import torch._dynamo
from conftest import KINDS, build, flat, pair, tensors_in
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
import fastrnn.functional as F


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    allowed = torch._dynamo.config.allow_rnn
    yield
    assert torch._dynamo.config.allow_rnn == allowed, "a test left the flag set"
    torch._dynamo.reset()


@pytest.fixture
def allow_rnn():
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


def functional(kind, rnn, **options):
    weights = list(rnn.parameters())
    bidirectional, layers = rnn.bidirectional, rnn.num_layers
    function = {"LSTM": F.lstm, "GRU": F.gru}.get(kind, F.rnn)
    extra = {} if function is not F.rnn else {"nonlinearity": kind[4:].lower()}

    def f(x, hx=None):
        return function(x, hx, weights, True, layers, 0.0, True, bidirectional, **extra, **options)

    return f


def close(found, expected):
    """Bit for bit: compiled code calls the same kernels, and there is nothing around them here to fuse."""
    found, expected = tensors_in(found), tensors_in(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b), (a - b).abs().max()


def train(f, x, parameters):
    outs = tensors_in(f(x))
    return [*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), [x, *parameters])]


@pytest.mark.parametrize("options", ["plain", "reset and lengths", "all states", "lengths as int32"])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_is_one_graph(kind, options):
    given = {}
    if "reset" in options:
        given["reset"] = torch.rand(6, 4) < 0.3
    if "lengths" in options:
        given["lengths"] = torch.tensor([6, 1, 0, 4], dtype=torch.int32 if "int32" in options else torch.int64)
    if options == "all states":
        given["all_states"] = True
    rnn, x = build(kind, 5, 7, num_layers=2, bidirectional=True), torch.randn(6, 4, 5, requires_grad=True)
    f = functional(kind, rnn, **given)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    close(train(compiled, x, rnn.parameters()), train(f, x, rnn.parameters()))
    with torch.no_grad():
        close(compiled(x), f(x))


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_functional_by_inductor(kind):
    rnn, x = build(kind, 5, 7, num_layers=2, bidirectional=True), torch.randn(6, 4, 5, requires_grad=True)
    f = functional(kind, rnn, reset=torch.rand(6, 4) < 0.3)
    close(train(torch.compile(f, fullgraph=True), x, rnn.parameters()), train(f, x, rnn.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_are_one_graph_with_the_flag(kind, allow_rnn):
    rnn, x = build(kind, 5, 7, num_layers=2, bidirectional=True), torch.randn(6, 4, 5, requires_grad=True)
    h = torch.randn(4, 4, 7)
    for f in (
        rnn,
        lambda v: rnn(v, (h, h.sin()) if kind == "LSTM" else h),
        lambda v: rnn(v, lengths=torch.tensor([6, 3, 1, 2])),
    ):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        close(train(compiled, x, rnn.parameters()), train(f, x, rnn.parameters()))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_are_one_graph_without_any_flag(name):
    cell, x = getattr(fastrnn, name)(5, 7), torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    close(train(compiled, x, cell.parameters()), train(cell, x, cell.parameters()))


def test_modules_without_the_flag_break_the_graph_and_stay_right():
    model = nn.Sequential(nn.Linear(5, 5), fastrnn.GRU(5, 7))
    x = torch.randn(6, 4, 5, requires_grad=True)
    close(train(torch.compile(model, backend="aot_eager"), x, model.parameters()), train(model, x, model.parameters()))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_importing_fastrnn_does_not_set_the_flag():
    assert torch._dynamo.config.allow_rnn is False


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_dynamic_shapes_do_not_recompile(kind):
    rnn, graphs = build(kind, 5, 7), []
    f = functional(kind, rnn)

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for T, B in [(6, 4), (9, 4), (3, 7), (20, 2), (2, 20)]:
        x = torch.randn(T, B, 5)
        close(compiled(x), f(x))
    assert len(graphs) == 1


def test_automatic_dynamic_shapes_train():
    rnn = fastrnn.LSTM(5, 7, bidirectional=True)
    f = functional("LSTM", rnn)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=3):
        for T, B in [(6, 4), (9, 4), (3, 7), (20, 3), (5, 9)]:
            x = torch.randn(T, B, 5, requires_grad=True)
            close(train(compiled, x, rnn.parameters()), train(f, x, rnn.parameters()))


def test_one_tensor_in_two_places_compiles(allow_rnn):
    rnn = fastrnn.LSTM(5, 7, bidirectional=True)
    rnn.weight_hh_l0_reverse = rnn.weight_hh_l0
    h = torch.randn(2, 4, 7, requires_grad=True)
    x = torch.randn(6, 4, 5, requires_grad=True)

    def f(v):
        return rnn(v, (h, h))

    leaves = [h, *rnn.parameters()]
    close(train(torch.compile(f, fullgraph=True, backend="aot_eager"), x, leaves), train(f, x, leaves))


def test_compiled_autocast(allow_rnn):
    rnn, x = fastrnn.LSTM(5, 7), torch.randn(6, 4, 5)

    def f(v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return rnn(v)

    close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_compiled_model_runs_around_the_operator():
    """The whole model, one graph, one operator for all its layers, or for one if that is all there is."""
    for layers, name in ((2, "fastrnn.stack"), (1, "fastrnn.layer")):
        targets = traced(fastrnn.GRU(5, 7, num_layers=layers))
        assert sum(name in t for t in targets) == sum("fastrnn." in t for t in targets) == 1


def traced(gru):
    """The operators of the graph of a model around `gru`, without gradients."""
    graphs, f = [], functional("GRU", gru)

    def backend(graph, example):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(lambda x: f(x.relu())[0].sum(), fullgraph=True, backend=backend)(torch.randn(6, 4, 5))
    return [str(node.target) for node in graphs[0].graph.nodes]


# Export, script, ONNX.


@pytest.mark.parametrize("kind", KINDS)
def test_non_strict_export(kind):
    rnn, x = build(kind, 5, 7, num_layers=2, bidirectional=True), torch.randn(6, 4, 5)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    program = torch.export.export(rnn.eval(), (x,), dynamic_shapes=({0: T, 1: B},), strict=False)
    for shape in [(6, 4), (9, 3)]:
        y = torch.randn(*shape, 5)
        close(program.module()(y), rnn(y))
    assert any("fastrnn" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    close(torch.export.load(file).module()(x), rnn(x))


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_scripting_gives_torchs_twin(kind):
    ours, theirs = pair(kind, 5, 7, num_layers=2)
    x = torch.randn(6, 4, 5)
    model = nn.Sequential(nn.Linear(5, 5), ours)
    twin = nn.Sequential(model[0], theirs)
    scripted = torch.jit.script(model)
    close(scripted(x), twin(x))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    close(torch.jit.load(file)(x), twin(x))
    assert "fastrnn::" not in str(scripted.inlined_graph)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_scripted_cells(name):
    cell = getattr(fastrnn, name)(5, 7)
    theirs = getattr(nn, name)(5, 7)
    theirs.load_state_dict(cell.state_dict())
    x = torch.randn(4, 5)
    close(torch.jit.script(cell)(x), theirs(x))


@pytest.mark.filterwarnings("ignore")
def test_tracing_records_torchs_operators():
    ours, theirs = pair("GRU", 5, 7)
    x = torch.randn(6, 4, 5)
    traced = torch.jit.trace(ours, x)
    close(traced(x), theirs(x))
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
    close(rnn(x), rnn(x))  # and the module runs on fastrnn as before


def test_packed_sequences_under_compile_stay_right():
    rnn = fastrnn.LSTM(5, 7, bidirectional=True)
    x = torch.randn(6, 4, 5)

    def f(v):
        output, hidden = rnn(pack_padded_sequence(v, torch.tensor([6, 4, 4, 1])))
        return output.data, *flat(hidden)

    close(torch.compile(f, backend="aot_eager")(x), f(x))
