"""torch.compile: one graph where promised, one compilation for all shapes, the bits of eager code.

Compiled code calls the same kernels, so it is compared bit for bit. What else is in the models here has one order of
summation: inductor sums in orders of its own.
"""

import time

import pytest
import torch
import torch._dynamo
from conftest import KINDS, build, equal, flat, tensors_in
from torch import nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.utils import run_and_get_code
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
import fastrnn.functional as F


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    allowed = torch._dynamo.config.allow_rnn
    # Graphs are lowered here and now, not taken from what an earlier run left on disk; objects that g++ made are.
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
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

    def f(x, hx=None, **given):
        return function(x, hx, weights, True, layers, 0.0, True, bidirectional, **extra, **options, **given)

    return f


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
    equal(train(compiled, x, rnn.parameters()), train(f, x, rnn.parameters()))
    with torch.no_grad():
        equal(compiled(x), f(x))


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
        equal(train(compiled, x, rnn.parameters()), train(f, x, rnn.parameters()))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_are_one_graph_without_any_flag(name):
    cell, x = getattr(fastrnn, name)(5, 7), torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    equal(train(compiled, x, cell.parameters()), train(cell, x, cell.parameters()))


def test_modules_without_the_flag_break_the_graph_and_stay_right():
    model = nn.Sequential(nn.Linear(5, 5), fastrnn.GRU(5, 7))
    x = torch.randn(6, 4, 5, requires_grad=True)
    equal(train(torch.compile(model, backend="aot_eager"), x, model.parameters()), train(model, x, model.parameters()))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_importing_fastrnn_does_not_set_the_flag():
    assert torch._dynamo.config.allow_rnn is False


def test_one_tensor_in_two_places_compiles(allow_rnn):
    rnn = fastrnn.LSTM(5, 7, bidirectional=True)
    rnn.weight_hh_l0_reverse = rnn.weight_hh_l0
    h = torch.randn(2, 4, 7, requires_grad=True)
    x = torch.randn(6, 4, 5, requires_grad=True)

    def f(v):
        return rnn(v, (h, h))

    leaves = [h, *rnn.parameters()]
    equal(train(torch.compile(f, fullgraph=True, backend="aot_eager"), x, leaves), train(f, x, leaves))


def test_compiled_autocast(allow_rnn):
    rnn, x = fastrnn.LSTM(5, 7), torch.randn(6, 4, 5)

    def f(v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return rnn(v)

    equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


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


def test_packed_sequences_under_compile_stay_right():
    rnn = fastrnn.LSTM(5, 7, bidirectional=True)
    x = torch.randn(6, 4, 5)

    def f(v):
        output, hidden = rnn(pack_padded_sequence(v, torch.tensor([6, 4, 4, 1])))
        return output.data, *flat(hidden)

    equal(torch.compile(f, backend="aot_eager")(x), f(x))


# Inductor: the generated code, not only the graph.


NOTHING, SEQUENCES, EVERYTHING = (), ("reset", "lengths"), ("reset", "lengths", "hx", "all_states")


def arguments(rnn, T, B, names, dtype=torch.float32):
    """What a call of `rnn` takes beside its input; states want gradients."""
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    states = [torch.randn(layers, B, 7, dtype=dtype, requires_grad=True) for _ in "hc"[: 1 + (rnn.mode == "LSTM")]]
    every = {
        "reset": torch.rand(*((B, T) if rnn.batch_first else (T, B))) < 0.3,
        "lengths": torch.randint(0, T + 1, (B,)),
        "hx": tuple(states) if rnn.mode == "LSTM" else states[0],
        "all_states": True,
    }
    return {name: every[name] for name in names}


class Model(nn.Module):
    """An RNN among what is usually around it. No sum in it has two orders: no bias after the RNN, and callers give each
    token once."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embedding = nn.Embedding(24, 6)
        self.rnn = build(kind, 6, 7, **options)
        self.head = nn.Linear(7 * (2 if self.rnn.bidirectional else 1), 3, bias=False)

    def forward(self, tokens, **given):
        output, *hidden = self.rnn(self.embedding(tokens).relu(), **given)
        return self.head(output).relu(), output, *hidden


def learn(f, leaves, *args, **given):
    """Results and gradients."""
    torch.manual_seed(11)
    outs = tensors_in(f(*args, **given))
    return [*outs, *torch.autograd.grad(sum(o.float().square().sum() for o in outs), leaves)]


def same_in_training_and_inference(compiled, model, tokens, given, operator):
    leaves = [*model.parameters(), *tensors_in(given["hx"] if "hx" in given else ())]
    found, code = run_and_get_code(learn, compiled, leaves, tokens, **given)
    equal(found, learn(model, leaves, tokens, **given))
    assert len(code) == 2, "one graph forward, one back"
    assert all("cpp_fused" in c for c in code)
    assert f"torch.ops.fastrnn.{operator}.default(" in code[0]
    assert f"torch.ops.fastrnn.{operator}_backward.default(" in code[1]
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            equal(compiled(tokens, **given), model(tokens, **given))


@pytest.mark.slow  # the first one, for which g++ compiles torch's headers
@pytest.mark.parametrize(
    "kind, names, dtype",
    [
        ("LSTM", NOTHING, torch.float32),
        ("LSTM", EVERYTHING, torch.float32),
        ("GRU", SEQUENCES, torch.float32),
        ("RNN_RELU", SEQUENCES, torch.float32),
        ("GRU", SEQUENCES, torch.bfloat16),
    ],
)
def test_models_by_inductor(kind, names, dtype, allow_rnn):
    model = Model(kind, **(dict(num_layers=2, bidirectional=True) if names else {})).to(dtype)
    given = arguments(model.rnn, 6, 4, names, dtype)
    compiled = torch.compile(model, fullgraph=True)
    operator = "stack" if names is SEQUENCES else "layer"
    same_in_training_and_inference(compiled, model, torch.randperm(24).view(6, 4), given, operator)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_by_inductor(kind):
    """Without any flag."""
    rnn = build(kind, 5, 7, batch_first=True, bidirectional=True)
    x, given = sequence(rnn, 6, 4, EVERYTHING)
    f = functional(kind, rnn, batch_first=True)
    leaves = [x, *rnn.parameters(), *tensors_in(given["hx"])]
    compiled = torch.compile(f, fullgraph=True)
    found = learn(compiled, leaves, x, **given)
    equal(found, learn(f, leaves, x, **given))
    equal(found, learn(rnn, leaves, x, **given))
    with torch.inference_mode():
        equal(compiled(x, **given), f(x, **given))


def test_dropout_by_inductor(allow_rnn):
    """With torch's generator in place of inductor's own, the masks are those of eager code, as torch documents."""
    model = Model("LSTM", num_layers=2, dropout=0.5)
    given = arguments(model.rnn, 6, 4, SEQUENCES)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(model, fullgraph=True)
        same_in_training_and_inference(compiled, model, torch.randperm(24).view(6, 4), given, "layer")


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell"])
def test_cells_by_inductor(name):
    """Several steps are one graph, with a reset between them as reinforcement learning has it."""
    cell, x = getattr(fastrnn, name)(5, 7), torch.randn(3, 4, 5, requires_grad=True)

    def f(x, keep):
        state, outputs = None, []
        for step, kept in zip(x, keep):
            if state is not None:
                state = tuple(s * kept for s in state) if name == "LSTMCell" else state * kept
            state = cell(step, state)
            outputs.extend(tensors_in(state))
        return outputs

    keep = (torch.rand(3, 4, 1) < 0.5).float()
    leaves = [x, *cell.parameters()]
    compiled = torch.compile(f, fullgraph=True)
    found, code = run_and_get_code(learn, compiled, leaves, x, keep)
    equal(found, learn(f, leaves, x, keep))
    assert "cpp_fused" in code[0] and code[0].count("torch.ops.fastrnn.step.default(") == 3
    with torch.no_grad():
        equal(compiled(x, keep), f(x, keep))


@pytest.mark.parametrize("kind, what", [("LSTM", "model"), ("GRU", "model and optimizer")])
def test_training_steps_by_inductor(kind, what, allow_rnn):
    # A power of two: it rounds nothing, so that it does not matter whether the update is a fused multiply-add.
    rate = 2.0**-5
    tokens, wanted = torch.randperm(24).view(6, 4), torch.randn(6, 4, 3)

    def train(compile, compile_step):
        torch.manual_seed(3)
        model = Model(kind, num_layers=2)
        given = arguments(model.rnn, 6, 4, SEQUENCES)
        optimizer = torch.optim.SGD(model.parameters(), rate)
        f, step = compile(model), compile_step(optimizer.step)
        for k in range(4):
            with torch._dynamo.config.patch(error_on_recompile=k > 1):
                optimizer.zero_grad()
                (f(tokens, **given)[0] - wanted).square().sum().backward()
                step()
        return list(model.parameters())

    def eager(f):
        return f

    found = train(lambda f: torch.compile(f, fullgraph=True), eager if what == "model" else torch.compile)
    equal(found, train(eager, eager))


# One compilation for every T and B.


class Counting:
    """Inductor, counting the graphs that it compiles: forward and back are one each."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example):
        return compile_fx(graph, example, inner_compile=self.inner)

    def inner(self, graph, example, **options):
        self.graphs.append(graph)
        return compile_fx_inner(graph, example, **options)

    def nodes(self):
        return [len(graph.graph.nodes) for graph in self.graphs]


def call(rnn, x, given):
    return rnn(x, **given)


def sequence(rnn, T, B, names):
    return torch.randn(*((B, T) if rnn.batch_first else (T, B)), 5, requires_grad=True), arguments(rnn, T, B, names)


def mark(rnn, x, given):
    """Says what changes. Dynamo then raises where it would have to take a size for a constant."""
    for t in (x, *([given["reset"]] if "reset" in given else [])):
        torch._dynamo.mark_dynamic(t, [0, 1])
    if "lengths" in given:
        torch._dynamo.mark_dynamic(given["lengths"], 0)
    for h in tensors_in(given["hx"] if "hx" in given else ()):
        torch._dynamo.mark_dynamic(h, 1)


def check(compiled, rnn, x, given):
    leaves = [x, *rnn.parameters(), *tensors_in(given["hx"] if "hx" in given else ())]
    equal(learn(compiled, leaves, rnn, x, given), learn(call, leaves, rnn, x, given))


# In no shape is B a number that a layer has too (I 5, H 7, layers * directions): dynamic=True gives equal sizes of the
# first call one symbol, and then one that is constant makes the other constant.
SHAPES = [(6, 9), (13, 9), (3, 11), (20, 2), (2, 20), (40, 33)]
VARIED = [
    ("LSTM", NOTHING, {}),
    ("LSTM", SEQUENCES, dict(num_layers=2, bidirectional=True)),
    ("GRU", EVERYTHING, dict(bidirectional=True)),
    ("GRU", ("lengths",), dict(num_layers=3, batch_first=True)),
    ("LSTM", EVERYTHING, dict(num_layers=2)),
    ("RNN_TANH", ("reset", "hx"), dict(num_layers=2, batch_first=True, bidirectional=True)),
]


@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic=True"])
@pytest.mark.parametrize("kind, names, options", VARIED)
def test_all_shapes_are_one_compilation(how, kind, names, options, allow_rnn):
    rnn, count = build(kind, 5, 7, **options), Counting()
    compiled = torch.compile(call, fullgraph=True, backend=count, dynamic=True if how == "dynamic=True" else None)
    for k, (T, B) in enumerate(SHAPES):
        x, given = sequence(rnn, T, B, names)
        if how == "mark_dynamic" and k == 0:
            mark(rnn, x, given)
        with torch._dynamo.config.patch(error_on_recompile=True):
            check(compiled, rnn, x, given)
    assert len(count.graphs) == 2
    with torch.no_grad():  # another graph, without a tape; again one
        for k, (T, B) in enumerate(SHAPES):
            x, given = sequence(rnn, T, B, names)
            with torch._dynamo.config.patch(error_on_recompile=k > 0):
                equal(compiled(rnn, x, given), call(rnn, x, given))
    assert len(count.graphs) == 3


@pytest.mark.parametrize("kind, names, options", VARIED[1:3])
def test_unmarked_shapes_are_two_compilations(kind, names, options, allow_rnn):
    """The first takes all sizes for constants, the second what has changed since for variables."""
    rnn, count = build(kind, 5, 7, **options), Counting()
    compiled = torch.compile(call, fullgraph=True, backend=count)
    for k, (T, B) in enumerate([(8, 3), *SHAPES]):
        with torch._dynamo.config.patch(error_on_recompile=k > 1):
            check(compiled, rnn, *sequence(rnn, T, B, names))
    assert len(count.graphs) == 4


def test_one_step_and_one_row_are_compilations_of_their_own(allow_rnn):
    """torch takes a size of 1 for a constant, as everywhere."""
    rnn, count = fastrnn.LSTM(5, 7, num_layers=2), Counting()
    compiled = torch.compile(call, fullgraph=True, backend=count, dynamic=True)
    for shape, graphs in [((6, 9), 2), ((1, 9), 4), ((6, 1), 6), ((1, 1), 8), ((7, 1), 8), ((1, 3), 8), ((4, 8), 8)]:
        check(compiled, rnn, *sequence(rnn, *shape, ("reset", "lengths", "hx")))
        assert len(count.graphs) == graphs


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_length_of_the_sequence_costs_nothing_to_compile(kind, allow_rnn):
    nodes, seconds = {}, {}
    for T in (10, 10, 1000):  # the first time for what is done once in a process
        torch._dynamo.reset()
        rnn, count = build(kind, 5, 7, num_layers=2), Counting()
        x, given = sequence(rnn, T, 3, SEQUENCES)
        leaves = [x, *rnn.parameters()]
        compiled = torch.compile(call, fullgraph=True, backend=count, dynamic=False)
        start = time.perf_counter()
        learn(compiled, leaves, rnn, x, given)
        seconds[T] = time.perf_counter() - start
        nodes[T] = count.nodes()
    assert len(nodes[10]) == 2
    assert nodes[10] == nodes[1000]
    assert seconds[1000] < 5 * seconds[10]  # were it linear, it would be 100


# What a graph holds, and what it does not.


@pytest.mark.parametrize("names", [NOTHING, SEQUENCES, EVERYTHING])
@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_breaks(kind, names, allow_rnn):
    rnn = build(kind, 5, 7, num_layers=2)
    x, given = sequence(rnn, 6, 4, names)
    found = torch._dynamo.explain(call)(rnn, x, given)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


@pytest.mark.parametrize("layers", [1, 2])
def test_values_of_lengths_are_no_constants(layers, allow_rnn):
    rnn = fastrnn.LSTM(5, 7, num_layers=layers)
    x, compiled = torch.randn(6, 4, 5, requires_grad=True), torch.compile(call, fullgraph=True)
    for k, values in enumerate([(6, 1, 0, 4), (2, 3, 6, 6), (0, 0, 0, 0)]):
        with torch._dynamo.config.patch(error_on_recompile=k > 0):
            check(compiled, rnn, x, {"lengths": torch.tensor(values)})


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_compiled_code_refuses_lengths_out_of_range(layers, grad, allow_rnn):
    rnn, x, compiled = fastrnn.GRU(5, 7, num_layers=layers), torch.randn(6, 4, 5), torch.compile(call, fullgraph=True)
    with torch.set_grad_enabled(grad):
        compiled(rnn, x, {"lengths": torch.tensor([6, 1, 0, 4])})
        for wrong in (7, -1):
            with (
                torch._dynamo.config.patch(error_on_recompile=True),
                pytest.raises(RuntimeError, match=f"lengths: expected values from 0 to T = 6, got {wrong} for row 2"),
            ):
                compiled(rnn, x, {"lengths": torch.tensor([6, 1, wrong, 4])})
