"""recompute=True: the same bits for a small part of the memory, with everything else a layer can do."""

import copy
import functools
import itertools
import pickle

import fastrnn._C as _C
import pytest
import torch
from conftest import DTYPES, ISAS, KINDS, build, dtype_name, equal, flat, normal, tensors_in
from torch.func import grad, vmap
from torch.library import opcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
import fastrnn.functional as F

CELLS = [*KINDS, "LSTM projected"]
I, H = 5, 9


def module(cell, dtype=torch.float32, layers=2, **options):
    kind, *projected = cell.split()
    extra = {"proj_size": 4} if projected else {}
    return build(kind, I, H, num_layers=layers, dtype=dtype, **extra, **options)


def both(rnn, call, leaves):
    """Outputs and gradients of `leaves` and of the parameters, without and with recompute."""
    for recompute in (False, True):
        rnn.recompute = recompute
        torch.manual_seed(1)
        outputs = tensors_in(call())
        incoming = [normal(*o.shape, dtype=o.dtype, seed=i) for i, o in enumerate(outputs)]
        wanted = [*leaves, *(p for p in rnn.parameters() if p.requires_grad)]
        yield outputs, torch.autograd.grad(outputs, wanted, incoming, allow_unused=True)


def same(rnn, call, leaves, exact, dtype):
    """Outputs and the first `exact` gradients bit for bit; the others are the same sums in another order."""
    (outputs, gradients), (again, regained) = both(rnn, call, leaves)
    equal(again, outputs)
    if exact:
        equal(regained[:exact], gradients[:exact])
    bound = {torch.float64: 1e-14, torch.float32: 1e-5}.get(dtype, 1e-2)
    for a, b in zip(regained, gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype == dtype
            assert (a.double() - b.double()).norm() <= bound * b.double().norm(), (a - b).abs().max()


def packed_call(rnn, x, lengths, hx, options):
    return rnn(pack_padded_sequence(x, lengths, enforce_sorted=False), hx, **options)


# Chunks are no matter of the instruction set, but for pairs of bfloat16: all dtypes on the widest, one on the others.
@pytest.mark.parametrize(
    ("isa", "dtype"),
    [(isa, d) for isa in ISAS for d in (DTYPES if isa == ISAS[-1] else [torch.float32])],
    ids=lambda v: v if isinstance(v, str) else dtype_name(v),
)
@pytest.mark.parametrize("rows", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits(cell, rows, dtype, isa):
    """With and without resets, reset states and all_states, in one direction and two; in time and batch major."""
    _C.set_isa(isa)
    for number, (resets, all_states, two) in enumerate(itertools.product([False, True], repeat=3)):
        T, B = (50, 7) if number % 2 else (90, 3)
        first = number % 3 == 0 and rows != "packed"
        rnn = module(cell, dtype, 1 if number == 5 else 2, bidirectional=two, batch_first=first)
        shape = (B, T) if first else (T, B)
        x = normal(*shape, I, dtype=dtype).requires_grad_()
        layers, P = rnn.num_layers * (1 + two), rnn.proj_size or H
        h, c = normal(layers, B, P, dtype=dtype, seed=1), normal(layers, B, H, dtype=dtype, seed=2)
        leaves = [t.requires_grad_() for t in ((h, c) if rnn.mode == "LSTM" else (h,))]
        hx = tuple(leaves) if len(leaves) > 1 else leaves[0]
        lengths = torch.randint(
            1 if rows == "packed" else 0, T + 1, (B,), generator=torch.Generator().manual_seed(number)
        )
        lengths[1] = T
        options, starts = {"all_states": True} if all_states else {}, []
        if resets:
            options["reset"] = torch.rand(T, B, generator=torch.Generator().manual_seed(9)) < 0.05
            if first:
                options["reset"] = options["reset"].t()
            starts = [normal(*t.shape, dtype=dtype, seed=7).requires_grad_() for t in leaves]
            options["reset_state"] = tuple(starts) if len(starts) > 1 else starts[0]
        call = functools.partial(rnn, x, hx, **options)
        if rows == "lengths":
            call = functools.partial(call, lengths=lengths.to(torch.int32) if number % 2 else lengths)
        elif rows == "packed":
            call = functools.partial(packed_call, rnn, x, lengths, hx, options)
        same(rnn, call, [x, *leaves, *starts], 1 + len(leaves), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_any_length(kind):
    """One chunk, two, and lengths beside the limits of chunks."""
    rnn = build(kind, I, H, bidirectional=True)
    for T in (1, 2, 15, 16, 17, 255, 256, 257, 513):
        x = normal(T, 2, I).requires_grad_()
        same(rnn, functools.partial(rnn, x), [x], 1, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_empty_frozen_and_partly_used(kind):
    rnn = build(kind, I, H, num_layers=2)
    x = normal(300, I).requires_grad_()
    same(rnn, lambda: rnn(x), [x], 1, torch.float32)
    same(rnn, lambda: rnn(x)[1], [x], 1, torch.float32)  # only the last state
    rnn.weight_hh_l0.requires_grad_(False)
    rnn.bias_ih_l1.requires_grad_(False)
    same(rnn, lambda: rnn(x), [x], 1, torch.float32)
    same(rnn, lambda: rnn(x.detach()), [], 0, torch.float32)
    nothing = torch.zeros(300, 0, I, requires_grad=True)
    same(rnn, lambda: rnn(nothing), [nothing], 1, torch.float32)
    rnn.requires_grad_(False)
    same(rnn, lambda: rnn(x), [x], 1, torch.float32)


def test_dropout_has_the_same_masks():
    rnn, x = build("LSTM", I, H, num_layers=3, dropout=0.4), normal(300, 2, I).requires_grad_()
    same(rnn, lambda: rnn(x), [x], 1, torch.float32)


def test_backward_twice_and_a_tied_weight():
    rnn, x = build("GRU", H, H, num_layers=2), normal(300, 2, H)
    rnn.weight_ih_l1 = rnn.weight_ih_l0
    rnn.recompute = True
    y = rnn(x)[0].square().sum()
    first = torch.autograd.grad(y, list(rnn.parameters()), retain_graph=True)
    equal(torch.autograd.grad(y, list(rnn.parameters())), first)


def test_later_changes_of_the_output_do_no_harm():
    rnn, x = build("LSTM", I, H), normal(300, 2, I)
    rnn.recompute = True
    expected = torch.autograd.grad(torch.relu(rnn(x)[0]).sum(), list(rnn.parameters()))
    y = rnn(x)[0].relu_()
    equal(torch.autograd.grad(y.sum(), list(rnn.parameters())), expected)


def saved_bytes(rnn, x):
    """Of what a call keeps for backward beside its input, its output and the parameters."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        results = rnn(x)
    for t in (x, *rnn.parameters(), *tensors_in(results)):
        kept.pop(t.data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved(kind, directions):
    """Four times less at least, several layers or one, and hardly any more for a longer sequence."""
    for layers, B in ((1, 1), (1, 32), (3, 4)):
        rnn = build(kind, 8, 16, num_layers=layers, bidirectional=directions == 2)
        x = normal(1000, B, 8)
        whole = saved_bytes(rnn, x)
        rnn.recompute = True
        part = saved_bytes(rnn, x)
        # The inputs of the upper of two directions' layers are kept either way: of an RNN, two fifths of everything.
        least = 4 if layers == 1 or directions == 1 else 1.9 if kind.startswith("RNN") else 3.3
        assert whole >= least * part, (layers, B, whole, part)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_checkpointing_double_backward_and_vmap(kind):
    rnn = build(kind, 3, 4, dtype=torch.float64)
    x = normal(40, 2, 3, dtype=torch.float64).requires_grad_()
    found = []
    for recompute in (False, True):
        rnn.recompute = recompute
        y = checkpoint(lambda v: rnn(v)[0], x, use_reentrant=False)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(g.square().sum(), [x, *rnn.parameters()])
        per_sample = vmap(grad(lambda v: rnn(v[:, None])[0].sin().sum()), in_dims=1, out_dims=1)(x.detach())
        found.append([y, g, *second, per_sample])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_every_length(kind):
    rnn = build(kind, I, H, num_layers=2)
    weights, graphs = list(rnn.parameters()), []
    function = {"LSTM": F.lstm, "GRU": F.gru}.get(kind, F.rnn)
    extra = {"nonlinearity": kind[4:].lower()} if function is F.rnn else {}

    def f(x, lengths):
        y, hidden = function(x, None, weights, num_layers=2, lengths=lengths, recompute=True, **extra)
        return [y, *flat(hidden)]

    def backend(graph, example):
        graphs.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    first = 0
    for number, (T, B) in enumerate(((40, 3), (700, 2), (90, 5))):
        x, lengths = normal(T, B, I).requires_grad_(), torch.arange(B) + T - B
        found, expected = compiled(x, lengths), f(x, lengths)
        equal(found, expected)
        gradients = (torch.autograd.grad(sum(o.square().sum() for o in o_), [x, *weights]) for o_ in (found, expected))
        equal(*gradients)
        first = len(graphs) if number == 0 else first  # Dynamo itself may ask twice for the first shape
    assert len(graphs) == first and max(graphs) < 50


@pytest.mark.parametrize("option", ["plain", "ragged", "packed", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_opcheck(cell, dtype, option):
    T, B, D, L = 40, 3, 2 if option in ("ragged", "everything") else 1, 2 if option == "plain" else 1
    rnn = {"rnn_tanh": "RNN_TANH", "lstm": "LSTM", "gru": "GRU"}[cell]
    rnn = build(rnn, I, H, num_layers=L, bidirectional=D == 2, dtype=dtype)
    lstm, weights = cell == "lstm", [w.detach() for w in rnn.parameters()]
    states = [normal(L * D, B, H, dtype=dtype, seed=s) for s in range(4)]
    h0, c0 = states[0], states[1] if lstm else None
    starts = (states[2], states[3] if lstm else None) if option == "everything" else (None, None)
    x, lengths, reset, sizes = normal(T, B, I, dtype=dtype), None, None, None
    if option in ("ragged", "everything"):
        lengths = torch.tensor([T, 0, 17])
    if option == "everything":
        reset = torch.rand(T, B) < 0.1
    if option == "packed":
        sizes = torch.tensor([3] * 10 + [2] * 20 + [1] * 10)
        x = normal(int(sizes.sum()), I, dtype=dtype)
    all_states = option == "everything"
    given = (cell, x, h0, c0, weights, sizes, lengths, reset, D == 2, L, 0, *starts)
    opcheck(torch.ops.fastrnn.recomputed.default, (*given, option == "ragged", all_states))
    output, h_n, c_n, h_all, c_all, *marks = torch.ops.fastrnn.recomputed(*given, False, all_states)
    incoming = (
        output,
        h_n,
        c_n if lstm else None,
        h_all if all_states else None,
        c_all if lstm and all_states else None,
    )
    needs = [True, True, lstm] + [True] * len(weights) + ([True, lstm] if starts[0] is not None else [])
    backward = (*given, *marks, *incoming, option == "ragged", needs)
    opcheck(torch.ops.fastrnn.recomputed_backward.default, backward)
    nothing = [False, False, False] + [True] + [False] * (len(needs) - 4)
    opcheck(torch.ops.fastrnn.recomputed_backward.default, (*backward[:-1], nothing))


def test_lengths_that_are_too_long_are_found_in_compiled_code():
    rnn, x = build("GRU", I, H), normal(40, 3, I)
    weights = list(rnn.parameters())
    compiled = torch.compile(
        lambda x, lengths: F.gru(x, None, weights, lengths=lengths, recompute=True)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    expected = F.gru(x, None, weights, lengths=torch.tensor([3, 40, 0]), recompute=True)[0]
    equal([compiled(x, torch.tensor([3, 40, 0], dtype=torch.int32))], [expected])
    for wrong in ([3, 41, 0], [3, -1, 0]):
        with pytest.raises(RuntimeError, match="lengths: expected values from 0 to T = 40, got"):
            compiled(x, torch.tensor(wrong, dtype=torch.int32))


def test_short_sequences_are_left_alone():
    rnn, x = build("LSTM", I, H, recompute=True), normal(16, 2, I)
    whole = saved_bytes(rnn, x)
    rnn.recompute = False
    assert saved_bytes(rnn, x) == whole


def test_operators_name_what_is_wrong():
    gru, x = build("GRU", I, H), normal(40, 3, I)
    weights, reset = [w.detach() for w in gru.parameters()], torch.zeros(40, 3).bool()
    good = dict(cell="gru", input=x, h0=None, c0=None, weights=weights, batch_sizes=None, lengths=None, reset=reset)
    for change, message in [
        (dict(cell="xx"), "cell: expected one of 'rnn_tanh', .* got 'xx'"),
        (dict(weights=[]), r"weights: expected at least two for each of 1 layer\(s\), got 0"),
        (dict(input=x[:0]), r"input: expected shape \(T, B, input_size\), T >= 1, got \(0, 3, 5\)"),
        (dict(h0=torch.zeros(1, 3, H).long()), "h0: expected dtype torch.float32 as input's, got torch.int64"),
        (dict(c0=torch.zeros(1, 3, H)), "c0: expected None for cell 'gru', got a tensor"),
        (dict(reset=torch.zeros(41, 3).bool()), r"reset: expected shape \(T, B\) = \(40, 3\), got \(41, 3\)"),
        (dict(lengths=torch.tensor([1, 2, 41])), "lengths: expected values from 0 to T = 40, got 41"),
        (dict(h0=torch.zeros(1, 2, H)), r"h0: expected shape"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastrnn.recomputed(*(good | change).values(), False, 1, 0, None, None, False, False)


def test_operations_are_counted():
    rnn, x = build("LSTM", I, H, num_layers=2), normal(300, 2, I)
    totals = []
    for recompute in (False, True):
        rnn.recompute = recompute
        with FlopCounterMode(display=False) as counter:
            rnn(x)[0].sum().backward()
        totals.append(counter.get_total_flops())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        rnn(x)
    assert totals[1] == totals[0] + counter.get_total_flops()


def test_the_keyword():
    for kind in (fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU):
        rnn = kind(I, H, num_layers=2, recompute=True)
        assert rnn.recompute and "recompute=True" in repr(rnn)
        assert not kind(I, H).recompute and "recompute" not in repr(kind(I, H))
        for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
            assert other.recompute
        theirs = fastrnn.restore(copy.deepcopy(rnn))
        assert type(theirs) is getattr(torch.nn, kind.__name__)
        assert fastrnn.accelerate(theirs).recompute
        assert not fastrnn.accelerate(getattr(torch.nn, kind.__name__)(I, H)).recompute
        with pytest.raises(TypeError, match="recompute: expected a bool, got int"):
            kind(I, H, recompute=1)
    with pytest.raises(TypeError, match="recompute: expected a bool, got str"):
        F.gru(normal(3, 2, I), None, list(fastrnn.GRU(I, H).parameters()), recompute="yes")
