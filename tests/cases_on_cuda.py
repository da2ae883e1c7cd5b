"""Calls on CUDA tensors, from modules down to kernels, for test_cuda_dispatch.py: it runs this file where a CUDA device
is made of host memory and kernels are emulated (emulated.py).

By the tolerance rule, with the CPU's kernels in the place of torch, and in float64 as the truth.
"""

import copy

import fastrnn._C as _C
import pytest
import torch
from conftest import DTYPES, KINDS, build, dtype_name, normal, tensors_in, with_gradients
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import functional, ops

T, B, I, H = 9, 3, 4, 21
LENGTHS = torch.tensor([7, 0, 9])
RESET = torch.tensor([[int(c) for c in row] for row in ("100101001", "010000000", "000110010")]).bool().T


@pytest.fixture(autouse=True)
def exact():
    """Float32 products as they are, unless a test says otherwise; the step path."""
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    _C.set_gpu_path("step")
    yield
    _C.set_gpu_path("")


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        data, sizes, *orders = value
        return PackedSequence(moved(data, device), sizes, *(None if o is None else o.to(device) for o in orders))
    return tuple(moved(v, device) for v in value) if isinstance(value, tuple) else value


def leaves(value):
    if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
        return [t for v in value for t in leaves(v)]
    return (
        [t for t in tensors_in(value) if t.requires_grad] if isinstance(value, (torch.Tensor, PackedSequence)) else []
    )


def widened(value):
    """In float64."""
    if isinstance(value, PackedSequence):
        return PackedSequence(widened(value.data), *value[1:])
    if isinstance(value, tuple):
        return tuple(widened(v) for v in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def check(rule, make, given, dtype=torch.float32, where=""):
    """make() -> module; given(dtype, seed) -> what it is called with, positional and by name."""

    def draw(seed):
        torch.manual_seed(seed)
        module = make().to(dtype)
        arguments, options = given(dtype, 1000 * seed)
        found = []
        for kind, device in ((dtype, "cuda"), (dtype, "cpu"), (torch.float64, "cpu")):
            here = copy.deepcopy(module).to(kind).to(device)
            values, named = arguments, tuple(options.values())
            if kind != dtype:
                values, named = widened(values), widened(named)
            values, named = moved(values, device), moved(named, device)
            result = here(*values, **dict(zip(options, named)))
            assert {t.device.type for t in tensors_in(result)} == {device}
            wanted = [*leaves((values, named)), *here.parameters()]
            found.append(with_gradients_on(device, result, wanted, seed))
        layouts = [{k: None if t is None else (t.stride(), t.dtype) for k, t in f.items()} for f in found[:2]]
        assert layouts[0] == layouts[1]
        return [{k: None if t is None else t.cpu() for k, t in f.items()} for f in found]

    rule.check(draw, dtype, where)


def with_gradients_on(device, outputs, wanted, seed):
    if device == "cpu":
        return with_gradients(outputs, wanted, seed + 7)
    outs = tensors_in(outputs)
    incoming = [normal(*o.shape, dtype=o.dtype, seed=seed + 7 + i).to(device) for i, o in enumerate(outs)]
    grads = torch.autograd.grad(outs, wanted, incoming, allow_unused=True)
    return {f"output {i}": o for i, o in enumerate(outs)} | {f"gradient {i}": g for i, g in enumerate(grads)}


def random(*shape, dtype, seed):
    return normal(*shape, dtype=dtype, seed=seed).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_layers(rule, kind, dtype):
    """Two of them in both directions, batch first: the layouts of output and of the input's gradient are the CPU's."""

    def make():
        return build(kind, I, H, num_layers=2, bidirectional=True, batch_first=True)

    check(rule, make, lambda dtype, seed: ((random(B, T, I, dtype=dtype, seed=seed),), {}), dtype, kind)


CALLS = {
    "initial states": lambda dtype, seed: dict(hx=random(4, B, H, dtype=dtype, seed=seed + 1)),
    "lengths": lambda dtype, seed: dict(lengths=LENGTHS),
    "lengths of int32": lambda dtype, seed: dict(lengths=LENGTHS.int(), all_states=True),
    "reset": lambda dtype, seed: dict(reset=RESET, all_states=True),
    "everything": lambda dtype, seed: dict(
        hx=random(4, B, H, dtype=dtype, seed=seed + 1), lengths=LENGTHS, reset=RESET, all_states=True,
        reset_state=random(4, 1, H, dtype=dtype, seed=seed + 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("call", CALLS)
def test_sequences(rule, call, dtype):
    def make():
        return fastrnn.GRU(I, H, num_layers=2, bidirectional=True)

    check(rule, make, lambda d, s: ((random(T, B, I, dtype=d, seed=s),), CALLS[call](d, s)), dtype, call)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ragged", ["dense", "lengths", "packed"])
def test_projections_and_recomputation(rule, ragged, recompute):
    steps = 40  # more than one chunk of recompute

    def given(dtype, seed):
        x = random(steps, B, I, dtype=dtype, seed=seed)
        if ragged == "packed":
            return (pack_padded_sequence(x.detach(), torch.tensor([30, 40, 20]), enforce_sorted=False),), {}
        return (x,), (dict(lengths=torch.tensor([33, 0, 40])) if ragged == "lengths" else {})

    for options in (dict(proj_size=6), dict(bidirectional=True)):
        check(rule, lambda options=options: fastrnn.LSTM(I, H, 2, recompute=recompute, **options), given, where=ragged)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_cells(rule, dtype):
    def given(states):
        def draw(dtype, seed):
            h, c = (random(B, H, dtype=dtype, seed=seed + i) for i in (1, 2))
            return (
                random(B, I, dtype=dtype, seed=seed),
                *(() if not states else ((h, c),) if states > 1 else (h,)),
            ), {}

        return draw

    check(rule, lambda: fastrnn.LSTMCell(I, H), given(2), dtype)
    check(rule, lambda: fastrnn.GRUCell(I, H), given(1), dtype)
    check(rule, lambda: fastrnn.RNNCell(I, H), given(0), dtype)


@pytest.mark.parametrize("path", ["block", "cluster", "grid"])
def test_forced_paths(rule, path):
    _C.set_gpu_path(path)
    assert fastrnn.build_info()["gpu_path"] == path
    plan = fastrnn.explain(fastrnn.GRU(I, 16).to("cuda"), torch.zeros(T, B, I).to("cuda"))
    assert plan.path == "fastrnn cuda kernel" and plan.isa is None and plan.threads is None
    assert plan.splits[0].startswith(f"{path}, ") and plan.splits[0].endswith("(forced)")
    check(rule, lambda: fastrnn.GRU(I, 16), lambda d, s: ((random(T, B, I, dtype=d, seed=s),), dict(reset=RESET)))


def twins(module):
    return module, copy.deepcopy(module).to("cuda")


def close(found, expected, tolerance=2e-6):
    found, expected = tensors_in(found), tensors_in(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cuda" and a.shape == b.shape and a.dtype == b.dtype
        assert (a.cpu() - b).norm() <= tolerance * b.norm() + 1e-7


def test_no_rows_one_sequence_and_lengths_that_do_not_fit():
    cpu, gpu = twins(fastrnn.LSTM(I, H, 2, bidirectional=True))
    for shape in ((T, 0, I), (T, I)):
        x = normal(*shape)
        close(gpu(x.to("cuda")), cpu(x))
    x = normal(T, B, I)
    expected = cpu(x, lengths=LENGTHS)
    # Nobody reads them there: clamped, whatever their strides; lengths of the host are moved.
    wild = torch.tensor([[7, 1], [-5, 1], [9000, 1]], dtype=torch.int32).to("cuda")[:, 0]
    for lengths in (wild, LENGTHS, LENGTHS.to("cuda")):
        close(gpu(x.to("cuda"), lengths=lengths), expected)
    empty = torch.zeros(T, 0, I).to("cuda").requires_grad_()
    gradients = torch.autograd.grad(gpu(empty)[0].sum(), [empty, *gpu.parameters()])
    assert gradients[0].shape == empty.shape and not any(g.cpu().any() for g in gradients[1:])


def test_lengths_on_a_gpu_and_rows_on_the_host():
    cpu = fastrnn.GRU(I, H)
    x = normal(T, B, I)
    assert cpu(x, lengths=LENGTHS.to("cuda"))[0].equal(cpu(x, lengths=LENGTHS)[0])


def test_torch_operations_do_what_torch_has_not():
    """Where the kernels are not to be used, on the device all the same."""
    cpu, gpu = twins(fastrnn.GRU(I, H))
    _C.set_gpu_path("torch")
    x = normal(T, B, I)
    assert fastrnn.explain(gpu, x.to("cuda"), lengths=LENGTHS).path == "reference"
    close(gpu(x.to("cuda"), lengths=LENGTHS, reset=RESET), cpu(x, lengths=LENGTHS, reset=RESET))


def test_step_goes_by_forward():
    for cpu, hx in ((fastrnn.LSTM(I, H, 2), (2, B, H)), (fastrnn.LSTMCell(I, H), (B, H))):
        cpu, gpu = twins(cpu)
        states = [normal(*hx, seed=i) for i in (1, 2)]
        there = [t.to("cuda") for t in states]
        x, reset = normal(B, I), torch.tensor([True, False, True])
        cpu.step(x, tuple(states), reset=reset)
        gpu.step(x.to("cuda"), tuple(there), reset=reset.to("cuda"))
        close(there, states)


def test_packed_weights_are_the_cpus_alone():
    w = [torch.zeros(3 * H, I).to("cuda"), torch.zeros(3 * H, H).to("cuda")]
    with pytest.raises(NotImplementedError, match="no CUDA kernel of fastrnn::pack"):
        ops.pack("gru", w, False, 1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_probe_says_what_it_says_on_the_cpu(kind):
    """By a loop over steps, since no kernel here makes the sums yet."""
    layer = build(kind, I, H, num_layers=2, bidirectional=True).double()
    x = normal(T, B, I, dtype=torch.float64)
    records = []
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(layer).to(device)
        with fastrnn.probe(here) as probe:
            here(x.to(device), lengths=LENGTHS, reset=RESET)[0].square().sum().backward()
        records.append([found.last.as_dict() for found in probe.layers()])
        assert len(probe.weights()) == len(list(layer.parameters())) and len(records[-1]) == 4
    for ours, theirs in zip(*records):
        for name in ("rows", "starts", "h", "h_grad", "h_grad_arrived", "c", "c_grad", "c_grad_arrived"):
            assert ours[name] == theirs[name] or ours[name] == pytest.approx(theirs[name], rel=1e-9), name
        for gate, figures in ours["gates"].items():
            for name, values in figures.items():
                assert values == pytest.approx(theirs["gates"][gate][name], rel=1e-9)


def test_weights_on_a_gpu_are_not_frozen():
    with pytest.raises(ValueError, match="weight_ih_l0: expected a CPU tensor .* got torch.float32 on cuda:0"):
        fastrnn.GRU(I, H).to("cuda").freeze()
    # Frozen and then moved: it computes with its weights.
    cpu, gpu = fastrnn.GRU(I, H).freeze(), fastrnn.GRU(I, H)
    gpu.load_state_dict(cpu.state_dict())
    x = normal(T, B, I)
    with torch.no_grad():
        close(gpu.freeze().to("cuda")(x.to("cuda")), cpu(x))


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_gradients_of_each_sample_and_of_gradients(kind):
    cpu, gpu = twins(build(kind, I, H, num_layers=2, bidirectional=True))
    x = normal(5, T, I)
    found = []
    for module, device in ((gpu, "cuda"), (cpu, "cpu")):
        weights = {k: v.detach() for k, v in module.named_parameters()}

        def loss(weights, row, module=module):
            return torch.func.functional_call(module, weights, (row.unsqueeze(1),))[0].square().sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x.to(device))
        rows = x.transpose(0, 1).to(device).requires_grad_()
        first = torch.autograd.grad(module(rows, lengths=torch.tensor([9, 0, 2, 9, 5]))[0].square().sum(), rows,
                                    create_graph=True)[0]  # fmt: skip
        second = torch.autograd.grad(first.square().sum(), [rows, *module.parameters()])
        found.append([*each.values(), first.detach(), *second])
    close(*found)


def test_compiled_in_one_graph():
    graphs = []

    def capture(graph, _):
        graphs.append(graph)
        return lambda arguments: graph(*arguments)

    def capture_boxed(graph, example):
        run = capture(graph, example)
        run._boxed_call = True
        return run

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=capture_boxed, bw_compiler=capture_boxed)
    cpu, gpu = twins(fastrnn.LSTM(I, H, 2))
    x = normal(T, B, I)

    def loss(x, weights, lengths):
        return functional.lstm(x, None, weights, num_layers=2, lengths=lengths)[0].square().sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    weights = list(gpu.parameters())
    expected = torch.autograd.grad(loss(x, list(cpu.parameters()), LENGTHS), list(cpu.parameters()))
    close(torch.autograd.grad(compiled(x.to("cuda"), weights, LENGTHS.to("cuda")), weights), expected)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if "fastrnn" in str(node.target)]
    assert called == ["fastrnn.stack.default", "fastrnn.stack_backward.default"]


def test_float32_may_be_rounded_where_torch_says_so():
    _, gpu = twins(fastrnn.GRU(64, 64))
    x = normal(T, B, 64).to("cuda")
    exact = gpu(x)[0].cpu()
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    rounded = gpu(x)[0].cpu()
    assert 1e-6 < (rounded - exact).norm() / exact.norm() < 1e-3
    assert "TensorFloat-32" in fastrnn.explain(gpu, x).why


def arguments(**changes):
    a = dict(cell="lstm", input=torch.zeros(T, B, I), h0=None, c0=None)
    a |= dict(weights=[torch.zeros(4 * H, I), torch.zeros(4 * H, H)], batch_sizes=None, lengths=None, reset=None)
    a = {
        k: [w.to("cuda") for w in v] if k == "weights" else v.to("cuda") if torch.is_tensor(v) else v
        for k, v in a.items()
    }
    return (*(a | changes).values(), False, False, False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(weights=[torch.zeros(4 * H, I).to("cuda"), torch.zeros(4 * H, H)]),
            r"weights\[1\] \(w_hh\): expected a tensor on cuda:0, got cpu",
        ),
        (dict(input=torch.zeros(T, B, I)), r"weights\[0\] \(w_ih\): expected a tensor on cpu, got cuda:0"),
        (dict(h0=torch.zeros(1, B, H)), "h0: expected a tensor on cuda:0, got cpu"),
        (dict(lengths=LENGTHS), "lengths: expected a tensor on cuda:0, got cpu"),
        (dict(reset=RESET), "reset: expected a tensor on cuda:0, got cpu"),
        (
            dict(batch_sizes=torch.tensor([B]).to("cuda"), input=torch.zeros(B, I).to("cuda")),
            "batch_sizes: expected a CPU",
        ),
        (
            dict(lengths=torch.zeros(B).to("cuda")),
            r"lengths: expected an int64 or int32 tensor of shape \(B,\) = \(3,\)",
        ),
    ],
)
def test_operators_name_what_is_wrong(changes, message):
    with pytest.raises(RuntimeError, match=message):
        ops.layer(*arguments(**changes))


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_fake_kernels(cell):
    """Of 16 units: what would pad the tape's blocks is no one's, and would not be the same twice."""
    G, P = ops.CELLS[cell]["gates"], 16
    weights = [normal(*shape, seed=i).to("cuda") for i, shape in enumerate(2 * [(G * P, I), (G * P, P)])]
    x, h0 = normal(T, B, I).to("cuda"), normal(2, B, P).to("cuda")
    c0 = h0 if cell == "lstm" else None
    given = (cell, x, h0, c0, weights, None, None, RESET.to("cuda"))
    opcheck(ops.layer, (*given, True, True, True, True))
    opcheck(ops.stack, (*given, True, True, 1, 0))
    output, *_, tape = ops.layer(*given, True, True, False, True)
    incoming = (output, None, None, None, None)
    opcheck(ops.layer_backward, (*given, tape, *incoming, True, True, [True] * 2 + [c0 is not None] + [True] * 4))
    opcheck(ops.layer_operands, (*given, tape, *incoming, True, True, [True] * 2 + [c0 is not None]))
    opcheck(ops.step, (cell, x[0], None, None, weights[:2], True))


def test_autocast_casts_everything():
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        for kind in KINDS:
            gpu = build(kind, I, H, **(dict(proj_size=5) if kind == "LSTM" else {})).to("cuda")
            x = normal(T, B, I).to("cuda").requires_grad_()
            output, hx = gpu(x)
            assert {t.dtype for t in tensors_in((output, hx))} == {torch.bfloat16}
            gradients = torch.autograd.grad(output.sum(), [x, *gpu.parameters()])
            assert {g.dtype for g in gradients} == {torch.float32}
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
