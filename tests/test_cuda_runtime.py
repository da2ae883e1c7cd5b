"""How calls on a GPU behave beside their numbers: the same bits every time, on any stream, from any thread, in a
captured graph; nobody waits for the card; memory does not grow; what is saved may be used twice.
"""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import KINDS, SIXTEEN, build, dtype_name, flat, normal, tensors_in
from gpu import PRECISIONS, asked_for, every_path, forced, needs_card
from test_determinism import equal, forward_and_gradients
from torch.nn.utils.rnn import pack_padded_sequence

pytestmark = needs_card

SIZES = [(12, 5, 9, 18), (5, 3, 33, 128), (30, 1, 40, 256), (4, 70, 7, 31), (9, 16, 64, 519)]  # T, B, I, H
THREE = ["RNN_TANH", "GRU", "LSTM"]


def case(kind, size, dtype=torch.float32, seed=1, **options):
    """A module of two layers and directions on the card, an input, states."""
    T, B, I, H = size
    torch.manual_seed(seed)
    options = {"num_layers": 2, "bidirectional": True} | options
    rnn = build(kind, I, H, dtype=dtype, **options).cuda()
    x = normal(T, B, I, dtype=dtype, seed=seed).cuda().requires_grad_()
    count = rnn.num_layers * (2 if rnn.bidirectional else 1)
    widths = (rnn.proj_size or H, H) if kind == "LSTM" else (H,)
    states = [normal(count, B, n, dtype=dtype, seed=seed + n).cuda().requires_grad_() for n in widths]
    return rnn, x, states


def everything_on(rnn, x):
    """lengths, resets and all states, all on the card."""
    T, B = x.shape[:2]
    g = torch.Generator().manual_seed(5)
    reset, lengths = torch.rand(T, B, generator=g) < 0.3, torch.randint(0, T + 1, (B,), generator=g)
    return dict(reset=reset.cuda(), lengths=lengths.cuda(), all_states=True)


# ---------------------------------------------------------------------------------------------------- the same bits


@every_path
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "float64"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_run_after_run(kind, size, precision, path):
    rnn, x, hx = case(kind, size, PRECISIONS[precision])
    first = None
    with forced(path), asked_for(precision):
        for _ in range(4):
            found = forward_and_gradients(rnn, x, hx)
            first = first or found
            assert equal(found, first)
            junk = [torch.full((n,), float("nan"), device="cuda") for n in (10, 1000, 1_000_000)]  # other leftovers
            del junk


@every_path
@pytest.mark.parametrize("kind", [*THREE, "LSTM projected"])
def test_run_after_run_with_everything_on(kind, path):
    kind, *projected = kind.split()
    rnn, x, hx = case(kind, (11, 19, 9, 70), **({"proj_size": 20} if projected else {}))
    options, first = everything_on(rnn, x), None
    with forced(path):
        for _ in range(4):
            found = forward_and_gradients(rnn, x, hx, **options)
            first = first or found
            assert equal(found, first)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=dtype_name)
@pytest.mark.parametrize("kind", THREE)
def test_backward_twice_over_one_graph(kind, dtype, path):
    """retain_graph: what was saved is not what backward works in."""
    rnn, x, hx = case(kind, (9, 17, 9, 100), dtype)
    with forced(path):
        output, hidden = rnn(x, tuple(hx) if kind == "LSTM" else hx[0])
        leaves = [x, *hx, *rnn.parameters()]
        loss = sum(v.float().square().sum() for v in (output, *flat(hidden)))
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves, retain_graph=True)
        third = torch.autograd.grad(loss, leaves)
    assert equal(first, second) and equal(first, third)


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_the_results_may_be_changed_in_place_before_backward(kind, path):
    rnn, x, hx = case(kind, (9, 17, 9, 37))
    given = tuple(hx) if kind == "LSTM" else hx[0]
    with forced(path):
        output, hidden = rnn(x, given)
        expected = torch.autograd.grad(output.relu().sum(), [x, *rnn.parameters()])
        output, hidden = rnn(x, given)
        for state in flat(hidden):
            state.mul_(2)  # memory of their own: the output does not change
        found = torch.autograd.grad(output.relu_().sum(), [x, *rnn.parameters()])
    assert equal(found, expected)


@every_path
def test_layouts_do_not_change_bits(path):
    """batch_first, strided and expanded inputs, an incoming gradient without memory of its own."""
    rnn, x, hx = case("LSTM", (9, 17, 9, 37))
    x = x.detach()
    wide = torch.zeros(18, 17, 30, device="cuda")
    wide[::2, :, 3:12] = x
    rows_first = build("LSTM", 9, 37, num_layers=2, bidirectional=True, batch_first=True).cuda()
    rows_first.load_state_dict(rnn.state_dict())
    with forced(path):
        plain, _ = rnn(x)
        assert rnn(wide[::2, :, 3:12])[0].equal(plain)
        assert rnn(x.transpose(0, 1).contiguous().transpose(0, 1))[0].equal(plain)
        assert rows_first(x.transpose(0, 1))[0].transpose(0, 1).equal(plain)
        assert rnn(x[:, :1].expand(9, 17, 9))[0].equal(rnn(x[:, :1].repeat(1, 17, 1))[0])
        weights = list(rnn.parameters())
        expanded = torch.autograd.grad(rnn(x)[0].sum(), weights)
        whole = torch.autograd.grad(rnn(x)[0], weights, torch.ones_like(plain))
    assert equal(expanded, whole)


# ------------------------------------------------------------------------------------------------ streams and threads


@every_path
def test_two_streams_at_once(path):
    """Two modules at work at the same time; kernels whose blocks wait for each other must not starve each other."""
    cases = [case("LSTM", (60, 16, 40, 256), seed=1), case("GRU", (60, 40, 40, 300), seed=2)]
    streams = [torch.cuda.Stream() for _ in cases]
    with forced(path):
        expected = [forward_and_gradients(*c) for c in cases]
        torch.cuda.synchronize()
        found = [[], []]
        for _ in range(6):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[i].append(forward_and_gradients(*cases[i]))
        torch.cuda.synchronize()
    for mine, want in zip(found, expected, strict=True):
        assert all(equal(results, want) for results in mine)


@every_path
def test_a_result_is_ordered_with_its_stream(path):
    """Work queued before and after on a stream that is not the default one is seen in order."""
    rnn, x, _ = case("LSTM", (20, 16, 40, 128), num_layers=1, bidirectional=False)
    with forced(path), torch.no_grad():
        expected, _ = rnn(x * 2)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            doubled = x * 2
            output, _ = rnn(doubled)
            doubled.fill_(torch.nan)
            copy = output.clone()
        stream.synchronize()
    assert copy.equal(expected)


@every_path
def test_several_threads(path):
    cases = [case(kind, size) for kind in THREE for size in SIZES[:2]]

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [equal(forward_and_gradients(*cases[k]), expected[k]) for k in (i % 6, (i + 3) % 6, (i + 5) % 6)]
            torch.cuda.current_stream().synchronize()
        return all(found)

    with forced(path):
        expected = [forward_and_gradients(*c) for c in cases]
        torch.cuda.synchronize()
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(16), timeout=100))


# ------------------------------------------------------------------------------------------------------------- graphs


def warmed_up(call):
    """torch wants a few calls on a side stream before it captures one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@every_path
@pytest.mark.parametrize("options", ["plain", "everything on"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", THREE)
def test_a_captured_graph_in_inference(kind, dtype, options, path):
    rnn, x, _ = case(kind, (24, 17, 33, 100), dtype)
    given = {} if options == "plain" else everything_on(rnn, x)
    inputs = [normal(*x.shape, dtype=dtype, seed=s).cuda() for s in (11, 12, 13)]
    shown = inputs[0].clone()
    with forced(path), torch.no_grad():
        expected = [[t.clone() for t in tensors_in(rnn(v, **given))] for v in inputs]
        warmed_up(lambda: rnn(shown, **given))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = tensors_in(rnn(shown, **given))
        for v, want in [*zip(inputs, expected, strict=True), (inputs[0], expected[0])]:
            shown.copy_(v)
            for t in found:
                t.fill_(torch.nan)
            graph.replay()
            assert equal(found, want)


@every_path
@pytest.mark.parametrize("options", ["plain", "everything on"])
@pytest.mark.parametrize("kind", THREE)
def test_a_captured_graph_of_a_training_step(kind, options, path):
    rnn, x, hx = case(kind, (24, 17, 33, 100))
    given = {} if options == "plain" else everything_on(rnn, x)
    inputs = [normal(*x.shape, seed=s).cuda() for s in (11, 12, 13)]

    def step():
        return forward_and_gradients(rnn, x, hx, **given)

    def show(v):
        with torch.no_grad():
            x.copy_(v)

    with forced(path):
        expected = []
        for v in inputs:
            show(v)
            expected.append([t.detach().clone() for t in step()])
        warmed_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [t.detach() for t in step()]
        for v, want in zip(inputs, expected, strict=True):
            show(v)
            for t in found:
                t.fill_(torch.nan)
            graph.replay()
            assert equal(found, want)


# ---------------------------------------------------------------------------------------------------- nobody waits


@every_path
@pytest.mark.parametrize("options", ["plain", "everything on"])
@pytest.mark.parametrize("kind", THREE)
def test_torch_sees_no_synchronisation(kind, options, path):
    rnn, x, hx = case(kind, (9, 17, 9, 64))
    given = {} if options == "plain" else everything_on(rnn, x)
    with forced(path):
        forward_and_gradients(rnn, x, hx, **given)  # what only a first call needs
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_and_gradients(rnn, x, hx, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_path
@pytest.mark.parametrize("options", ["plain", "everything on"])
def test_a_call_returns_before_the_card_has_begun(options, path):
    """With the card busy for a second, a training step (of few enough kernels for the queue) returns at once."""
    rnn, x, hx = case("LSTM", (8, 17, 9, 64), num_layers=1)
    given = {} if options == "plain" else everything_on(rnn, x)
    with forced(path):
        for _ in range(2):
            forward_and_gradients(rnn, x, hx, **given)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        begin = time.perf_counter()
        forward_and_gradients(rnn, x, hx, **given)
        returned = time.perf_counter() - begin
        torch.cuda.synchronize()
        done = time.perf_counter() - begin
    assert done > 0.3, "the card was not kept busy: this test shows nothing"
    assert returned < 0.5 * done


# ------------------------------------------------------------------------------------------------------------- memory


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_memory_does_not_grow(kind, path):
    rnn, x, hx = case(kind, (50, 33, 40, 128))
    given = everything_on(rnn, x)

    def steps(count):
        for _ in range(count):
            forward_and_gradients(rnn, x, hx)
            forward_and_gradients(rnn, x, hx, **given)
        torch.cuda.synchronize()
        gc.collect()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    with forced(path):
        before = steps(3)
        after = steps(20)
    assert after[0] <= before[0] and after[1] <= before[1], (before, after)


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_what_backward_keeps(kind, path):
    """At most five values for each step, row and unit for LSTM and GRU and one for RNN (README), rounded up to blocks
    of 16, and what was there before: input, output, states."""
    T, B, H = 200, 32, 120
    rnn, x, _ = case(kind, (T, B, 24, H), num_layers=1, bidirectional=False)
    with forced(path):
        rnn(x)
        torch.cuda.synchronize()
        gc.collect()
        before = torch.cuda.memory_allocated()
        output, _ = rnn(x)
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before - output.nbytes
    assert kept <= T * B * 128 * 4 * (1 if kind == "RNN_TANH" else 5) * 1.02 + 1e5


@every_path
def test_scratch_memory_does_not_grow_with_the_sequence(path):
    """Backward works chunk by chunk: what it needs beside what it returns is bounded, but for a few bytes a step."""
    needed = {}
    for T in (10_000, 20_000):
        rnn, x, _ = case("LSTM", (T, 8, 16, 256), num_layers=1, bidirectional=False)
        with forced(path):
            output, _ = rnn(x)
            incoming = torch.ones_like(output)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            grads = torch.autograd.grad(output, [x, *rnn.parameters()], incoming)
            torch.cuda.synchronize()
            needed[T] = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
            del grads, output, incoming
    assert needed[20_000] - needed[10_000] <= 64 * 10_000, needed


@every_path
def test_packed_sequences_in_turn(path):
    """Other lengths at every call: what is copied to the card for one call is not overwritten by the next."""
    rnn, x, _ = case("GRU", (30, 16, 9, 64))
    g = torch.Generator().manual_seed(2)
    batches = [torch.randint(1, 31, (16,), generator=g).clamp_max(30) for _ in range(12)]
    packed = [pack_padded_sequence(x.detach(), lengths, enforce_sorted=False) for lengths in batches]
    with forced(path), torch.no_grad():
        alone = []
        for p in packed:
            alone.append(rnn(p)[0].data.clone())
            torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        together = [rnn(p)[0].data for p in packed]
    assert equal(together, alone)
