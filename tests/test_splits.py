"""How layers are shared out among threads changes no bit: of outputs, states and every gradient, in every tier.

The split is forced (fastrnn._C.set_split), and compared with one thread. Sizes give each way real work: hidden sizes of
several groups of vectors, batches that the threads do not divide. What else must not change bits: test_determinism.py.
"""

import itertools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import fastrnn._C as _C
import pytest
import torch
from conftest import KINDS, build, shared_out, tensors_in
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import ops

# T, B, H
SIZES = [(1, 1, 200), (12, 1, 61), (1, 33, 70), (9, 3, 130), (9, 33, 70), (40, 1, 130), (40, 3, 70), (4, 2, 130)]
I = 11
# (split, threads), to be compared with ("serial", 1).
WAYS = [
    ("serial", 3),
    *(("batch", threads) for threads in (2, 3, 5, 8)),
    *(("hidden", threads) for threads in (2, 3, 5, 8)),
    *(("ahead", threads) for threads in (2, 4)),
    *(("", threads) for threads in (2, 3, 8)),
]
VARIANTS = {
    "dense": {},
    "lengths": {"lengths": True},
    "packed": {"packed": True},
    "reset": {"reset": True, "lengths": True, "all_states": True, "bidirectional": True},
    "bidirectional": {"bidirectional": True},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, both directions, packed": {"dtype": torch.bfloat16, "bidirectional": True, "packed": True},
}


def case(
    kind, T, B, H, dtype=torch.float32, bidirectional=False, lengths=False, packed=False, reset=False, I=I, **options
):
    """A call that returns every result and every gradient of one layer with given states."""
    torch.manual_seed(T + B + H)
    kind, *projected = kind.split()
    D, P = 1 + bidirectional, H // 2 + 1 if projected else H
    extra = {"proj_size": P} if projected else {}
    rnn = build(kind, I, H, bidirectional=bidirectional, dtype=dtype, **extra)
    x = torch.randn(T, B, I, dtype=dtype)
    hx = [torch.randn(D, B, n, dtype=dtype, requires_grad=True) for n in ((P, H) if kind == "LSTM" else (H,))]
    if lengths or packed:
        given = torch.randint(1 - lengths, T + 1, (B,))
        given[0] = T
        if packed:
            x = pack_padded_sequence(x, given, enforce_sorted=False)
        else:
            options["lengths"] = given
            x[torch.arange(T)[:, None] >= given] = torch.nan  # what lies past a length is never read
    if reset:
        options["reset"] = torch.rand(T, B) < 0.2
    leaf = (x.data if packed else x).requires_grad_()

    def call():
        found = rnn(x._replace(data=leaf) if packed else leaf, tuple(hx) if len(hx) == 2 else hx[0], **options)
        outs = tensors_in(found)
        incoming = [torch.linspace(-1, 1, o.numel()).reshape(o.shape).to(dtype) for o in outs]
        leaves = {"input": leaf, **{f"state {i}": h for i, h in enumerate(hx)}, **dict(rnn.named_parameters())}
        grads = torch.autograd.grad(outs, list(leaves.values()), incoming)
        return {f"result {i}": o.detach() for i, o in enumerate(outs)} | dict(zip(leaves, grads))

    return call


def differences(found, expected):
    return [name for name, value in expected.items() if not found[name].equal(value)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_no_way_of_sharing_out_changes_a_bit(kind, variant, isa):
    for number, size in enumerate(SIZES):
        call = case(kind, *size, **VARIANTS[variant])
        with shared_out("serial", 1):
            expected = call()
        for name, value in expected.items():
            assert value.isfinite().all(), (size, name)
        # The widest tier goes through everything; the others, which have the same code, through a part of it each.
        ways = WAYS if isa in ("avx512", _C.isas()[-1]) else WAYS[number % 3 :: 3]
        for way in ways:
            with shared_out(*way):
                assert not differences(call(), expected), (size, way)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_few_rows_of_a_wide_input(kind, variant, isa):
    """Its gradient is shared out by columns."""
    sizes = [(1, 3, 70, 300), (1, 33, 130, 200), (1, 70, 40, 515), (9, 4, 70, 300), (50, 1, 33, 130)]
    if isa not in ("avx512", _C.isas()[-1]):  # the others have the same code
        sizes = sizes[list(VARIANTS).index(variant) % 2 :: 2]
    for T, B, H, wide in sizes:
        call = case(kind, T, B, H, I=wide, **VARIANTS[variant])
        with shared_out("serial", 1):
            expected = call()
        for way in (("batch", 2), ("hidden", 2), ("hidden", 3), ("", 2), ("", 3), ("", 16)):
            with shared_out(*way):
                assert not differences(call(), expected), (T, B, H, wide, way)


@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
@pytest.mark.parametrize("T", [1, 4])
def test_few_rows_are_some_of_many(kind, T, isa):
    """Of few, weights are packed as they are used; of many, before."""
    kind, *projected = kind.split()
    rnn = build(kind, 200, 130, bidirectional=True, **({"proj_size": 41} if projected else {}))
    x = torch.randn(T, 300, 200)
    hx = [torch.randn(2, 300, n) for n in ((41 if projected else 130, 130) if kind == "LSTM" else (130,))]

    def gradients(rows):
        leaves = [t[:, rows].clone().requires_grad_() for t in (x, *hx)]
        output = rnn(leaves[0], tuple(leaves[1:]) if kind == "LSTM" else leaves[1])[0]
        return torch.autograd.grad(output, leaves, torch.linspace(-1, 1, output.shape[-1]).expand_as(output))

    for threads in (1, 2):
        with shared_out("", threads):
            many = gradients(slice(300))
            for rows in (slice(0, 40), slice(50, 300), slice(7, 17)):
                for few, of_many in zip(gradients(rows), many, strict=True):
                    assert few.equal(of_many[:, rows]), (threads, rows)


def test_the_sizes_give_every_way_real_work():
    """Else the test above would compare one thread with itself."""
    with shared_out("batch", 8):
        if _C.split("lstm", False, 9, 64, I, 70, 70, 1, 8)["slices"] < 8:
            pytest.skip("the CPU quota of this process is below the eight threads of this test")
    seen = set()
    for split, threads in WAYS:
        for (T, B, H), D in itertools.product(SIZES, (1, 2)):
            with shared_out(split, threads):
                found = _C.split("lstm", False, T, B, I, H, H, D, threads)
            seen.add((split, found["directions"], found["slices"] > 1, found["parts"] > 1, found["ahead"]))

    def ways(name):
        return {tuple(way) for split, *way in seen if split == name}

    assert ways("serial") == {(1, False, False, False)}
    assert ways("batch") >= {(1, True, False, False), (2, True, False, False)}
    assert ways("hidden") >= {(1, False, True, False), (2, False, True, False)}
    assert ways("ahead") >= {(1, False, False, True), (1, True, False, True), (2, False, False, True)}
    assert len(ways("")) > 1


def test_an_unknown_split_is_refused():
    with pytest.raises(
        ValueError, match="split: expected 'serial', 'batch', 'hidden', 'wavefront', 'ahead', or '' .*, got 'both'"
    ):
        _C.set_split("both")
    with pytest.raises(ValueError, match="cell: expected the name of a cell, got 'nonsense'"):
        _C.split("nonsense", False, 1, 1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize("split", ["serial", "batch", "hidden"])
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_padding_is_never_touched(kind, split, isa):
    """NaN, infinity or zero past the lengths: the same bits everywhere, nothing of it in any result."""
    T, B, H = 9, 6, 130
    kind, *projected = kind.split()
    rnn = build(kind, I, H, 2, bidirectional=True, **({"proj_size": 70} if projected else {}))
    lengths = torch.tensor([9, 0, 1, 5, 8, 3])
    past = torch.arange(T)[:, None] >= lengths
    x = torch.randn(T, B, I)
    with shared_out(split, 3):
        first = None
        for filling in (0.0, torch.nan, torch.inf):
            given = x.masked_fill(past[:, :, None], filling).requires_grad_()
            output, _ = rnn(given, lengths=lengths)
            gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            # nor is the incoming gradient there
            gradient[past] = filling
            found = [output, *torch.autograd.grad(output, [given, *rnn.parameters()], gradient)]
            first = first or found
            assert all(f.equal(want) for f, want in zip(found, first)), filling
        assert not found[0][past].any()
        assert not found[1][past].any()
        assert all(f.isfinite().all() for f in found)


@pytest.mark.parametrize("split", ["batch", "hidden"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "lstm projected"])
def test_the_tape_has_no_padding(cell, split, isa):
    """Backward reads of the tape the stored rows, and of no row more: those behind them may hold anything."""
    T, B, H = 9, 7, 130
    cell, *projected = cell.split()
    G, P = {"rnn_tanh": 1, "lstm": 4, "gru": 3}[cell], 70 if projected else H
    shapes = [(G * H, I), (G * H, P), (G * H,), (G * H,), *[(P, H)] * len(projected)] * 2
    weights = [torch.randn(shape) / 10 for shape in shapes]
    x, lengths = torch.randn(T, B, I), torch.tensor([2, 9, 0, 4, 4, 1, 7])
    common = (cell, x, None, None, weights, None, lengths, None)
    needs = [True, True, cell == "lstm", *[True] * len(weights)]
    with shared_out(split, 3):
        output, *_, tape = ops.layer(*common, True, False, False, True)
        gradient = torch.randn(output.shape)
        stored = 2 * int(lengths.sum())  # two directions, one behind the other
        tape = tape.clone()
        rows = tape.view(-1, tape.size(-1))
        assert rows.size(0) > stored
        found = []
        for filling in (0.0, torch.nan):
            rows[stored:] = filling
            found.append(ops.layer_backward(*common, tape, gradient, None, None, None, None, True, False, needs))
        for a, b, needed in zip(*found, needs):
            assert a.isfinite().all()
            assert a.equal(b)
            assert a.numel() or not needed
        rows[stored - 1] = torch.nan  # and this is one of the stored ones: it matters
        spoilt = ops.layer_backward(*common, tape, gradient, None, None, None, None, True, False, needs)
        assert any(s.isnan().any() for s in spoilt)


HANGING = """
import torch, fastrnn
from fastrnn import _C
torch.manual_seed(0)
modules = [fastrnn.LSTM(9, 200, 2, bidirectional=True), fastrnn.GRU(9, 130), fastrnn.LSTM(9, 200, proj_size=70)]
small, many = fastrnn.GRU(9, 40, 8), torch.randn(300, 1, 9)
x = torch.randn(25, 3, 9)
def run():
    found = []
    for rnn in modules:
        rnn.zero_grad()
        output, _ = rnn(x, lengths=torch.tensor([25, 3, 14]))
        output.sum().backward()
        found += [output.detach(), *(p.grad for p in rnn.parameters())]
    with torch.no_grad():
        return [*found, *small(many)]
torch.set_num_threads(1)
alone = run()
torch.set_num_threads({threads})
for split in 2 * ["hidden", "wavefront", "ahead"]:
    _C.set_split(split)
    assert all(a.equal(b) for a, b in zip(run(), alone))
print("finished")
"""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OMP_WAIT_POLICY": "active"},
        {"OMP_WAIT_POLICY": "passive"},
        {"OMP_THREAD_LIMIT": "3"},
        {"OMP_DYNAMIC": "true"},
    ],
    ids=str,
)
def test_parts_that_wait_for_each_other_on_too_few_cores(environment):
    """Eight parts meet after every step on one or two cores: slow, right, and no hang."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | environment
    pin = "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])\n"
    source = (pin if hasattr(os, "sched_setaffinity") else "") + textwrap.dedent(HANGING.format(threads=8))
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "finished\n"


def test_two_python_threads_that_both_have_parts():
    """Both calls want the pool at once: each is right, whatever it gets."""
    calls = [case(kind, 9, 3, 130, bidirectional=True) for kind in KINDS]
    with shared_out("serial", 1):
        expected = [call() for call in calls]
    with shared_out("hidden", 2), ThreadPoolExecutor(2) as pool:
        for k, found in enumerate(pool.map(lambda k: calls[k % 4](), range(16), timeout=120)):
            assert not differences(found, expected[k % 4]), k


def test_the_split_can_change_between_forward_and_backward():
    """The tape is the same whoever wrote it."""
    for kind in KINDS:
        rnn, x = build(kind, I, 130, bidirectional=True), torch.randn(9, 5, I, requires_grad=True)
        expected = None
        for first, second in (("serial", "serial"), ("batch", "hidden"), ("hidden", "batch"), ("hidden", "serial")):
            with shared_out(first, 4):
                output, _ = rnn(x)
            with shared_out(second, 3):
                found = [output, *torch.autograd.grad(output.square().sum(), [x, *rnn.parameters()])]
            expected = expected or found
            assert all(a.equal(b) for a, b in zip(found, expected)), (kind, first, second)


# -------------------------------------------------------------------------------------------------- layers in one call

STACKS = {
    "dense": {},
    "one step": {"T": 1},
    "two steps": {"T": 2},
    "long": {"T": 300},
    "one row": {"B": 1, "H": 20},
    "narrow input": {"I": 2},
    "many rows": {"B": 70, "T": 20},
    "five layers": {"layers": 5},
    "no states": {"hx": False},
    "no bias": {"bias": False},
    "reset": {"reset": True},
    "batch first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "lengths": {"lengths": True, "reset": True},
    "packed": {"packed": True},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "dropout, not training": {"dropout": 0.5},
}


def stack(kind, T=75, B=3, I=11, H=70, layers=3, dtype=torch.float32, hx=True, reset=False, lengths=False, packed=False,
          **options):  # fmt: skip
    """A call of several layers that returns all its results."""
    torch.manual_seed(T + B)
    kind, *projected = kind.split()
    D, P = 1 + options.get("bidirectional", False), H // 2 + 1 if projected else H
    extra = {"proj_size": P} if projected else {}
    rnn = build(kind, I, H, layers, dtype=dtype, **options, **extra).eval()
    x = torch.randn(*((B, T) if options.get("batch_first") else (T, B)), I, dtype=dtype)
    states = tuple(torch.randn(layers * D, B, n, dtype=dtype) for n in ((P, H) if kind == "LSTM" else (H,)))
    given = {"reset": torch.rand(T, B) < 0.1} if reset else {}
    if lengths:
        given["lengths"] = torch.randint(0, T + 1, (B,))
    if packed:
        x = pack_padded_sequence(x, torch.randint(1, T + 1, (B,)), enforce_sorted=False)
    hx = None if not hx else states if kind == "LSTM" else states[0]
    wanted = [x.data if packed else x, *(states if hx is not None and kind == "LSTM" else [] if hx is None else [hx])]

    def call(gradients=False):
        for tensor in wanted:
            tensor.requires_grad_(gradients)
        results = tensors_in(rnn(x, hx, **given))
        if not gradients:
            return [t.detach() for t in results]
        loss = sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in results)
        found = torch.autograd.grad(loss, [*wanted, *rnn.parameters()])
        return [t.detach() for t in (*results, *found)]

    return call


@pytest.mark.parametrize("variant", STACKS)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_layers_in_one_call_are_the_layers_one_by_one(kind, variant, isa):
    """Bit for bit, one after the other and as a wavefront, forward and back."""
    call = stack(kind, **STACKS[variant])
    with shared_out("serial", 1):
        expected = call(gradients=True)
    assert all(t.isfinite().all() for t in expected)
    for split, threads in (("ahead", 2), ("", 2), ("wavefront", 2), ("wavefront", 3), ("wavefront", 8), ("hidden", 2)):
        with shared_out(split, threads):
            with torch.no_grad():
                found = call()
            assert all(a.equal(b) and a.stride() == b.stride() for a, b in zip(found, expected)), (split, threads)
            found = call(gradients=True)
        assert all(a.equal(b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True)), (
            split,
            threads,
        )


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_layers_below_the_first_that_learns_save_nothing(frozen):
    """And their gradients are not computed: those of the others are what they are with every layer learning."""
    torch.manual_seed(0)
    rnn, x = fastrnn.GRU(5, 9, 3), torch.randn(20, 4, 5)
    rnn(x)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in rnn.named_parameters()}
    rnn.zero_grad()
    for name, p in rnn.named_parameters():
        p.requires_grad_(int(name[-1]) >= frozen)
    output, _ = rnn(x)
    tapes = [t for t in output.grad_fn.saved_tensors if t is not None and t.dim() == 3 and t.size(-1) >= 3 * 16]
    assert sum(t.size(0) for t in tapes) == 3 - frozen
    output.square().sum().backward()
    for name, p in rnn.named_parameters():
        assert p.grad.equal(expected[name]) if int(name[-1]) >= frozen else p.grad is None


def test_a_wavefront_is_chosen_for_small_layers_alone():
    def groups(cell="lstm", T=500, B=1, H=64, D=1, threads=2, layers=2, float64=False):
        return _C.split(cell, float64, T, B, H, H, H, D, threads, layers)["groups"]

    if _C.split("lstm", False, 9, 64, I, 70, 70, 1, 8)["slices"] < 2:
        pytest.skip("the CPU quota of this process is one core: nothing is ever shared out")
    for cell in ("lstm", "gru", "rnn_tanh"):
        assert groups(cell) == 2
    assert groups("rnn_tanh", H=8) == 1  # handing on costs more
    assert groups(layers=1) == groups(threads=1) == groups(D=2) == groups(T=1) == 1
    assert groups(B=64, H=256) == 1  # slices of the batch do not wait
    assert groups(layers=4, threads=2) == 2
    with shared_out("hidden", 2):
        assert groups() == 1


def test_explain_tells_of_a_wavefront():
    module, x = fastrnn.LSTM(32, 32, 2), torch.randn(500, 1, 32)
    with shared_out("wavefront", 2):
        plan = fastrnn.explain(module, x)
        with torch.no_grad():
            assert fastrnn.explain(module, x) == plan
        assert "wavefront" not in str(fastrnn.explain(module, x, all_states=True))
        assert "wavefront" not in str(fastrnn.explain(module, x, lengths=torch.tensor([7])))
        assert "wavefront" not in str(fastrnn.explain(module, x[:0]))
        assert "wavefront" not in str(fastrnn.explain(module, x[:, :0]))
        assert fastrnn.explain(fastrnn.LSTM(32, 32), x).splits[0].startswith("one thread")
        between = fastrnn.LSTM(32, 32, 2, dropout=0.5)
        assert "wavefront" not in str(fastrnn.explain(between, x))
        assert "wavefront" in str(fastrnn.explain(between.eval(), x))
    assert all(s.startswith("wavefront over time, 2 groups of layers side by side; limit: ") for s in plan.splits)


def test_the_input_is_projected_ahead_of_small_recurrences():
    def ahead(cell="lstm", T=500, B=1, I=64, H=64, threads=2):
        return _C.split(cell, False, T, B, I, H, H, 1, threads)["ahead"]

    if _C.split("lstm", False, 9, 64, I, 70, 70, 1, 8)["slices"] < 2:
        pytest.skip("the CPU quota of this process is one core: nothing is ever shared out")
    assert ahead() and ahead("gru") and ahead("gru", H=40)
    assert not ahead(T=1) and not ahead(threads=1) and not ahead(B=32)
    assert not ahead(I=1)  # the step multiplies it itself
    assert not ahead(H=512)  # the hidden units are shared out


def test_explain_tells_what_was_forced():
    with shared_out("serial", 2):
        assert fastrnn.explain(fastrnn.LSTM(9, 200), torch.randn(9, 3, 9)).splits[0].startswith("one thread")
