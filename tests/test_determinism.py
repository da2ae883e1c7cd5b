"""The same inputs give the same bits: run after run, at any thread count, whatever the other rows. And nothing hangs.

The hanging kind runs in a child process with a time-out, because a barrier that waits for a worker that never comes
would hang the whole suite.
"""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import KINDS, SIXTEEN, build, dtype_name, tensors_in

import fastrnn

SIZES = [(12, 5, 9, 18), (5, 3, 33, 128), (3, 1, 40, 256), (4, 37, 7, 31)]  # T, B, I, H


def forward_and_gradients(rnn, x, hx, weights=True, **options):
    """Results, and the gradients of the input, of the states and of the weights."""
    leaves = [x, *hx, *(rnn.parameters() if weights else ())]
    outs = tensors_in(rnn(x, tuple(hx) if len(hx) == 2 else hx[0], **options))
    grads = torch.autograd.grad(sum(o.double().square().sum() for o in outs), leaves)
    return [*outs, *grads]


def case(kind, size, dtype=torch.float32, **options):
    T, B, I, H = size
    torch.manual_seed(1)
    rnn = build(kind, I, H, num_layers=2, bidirectional=True, dtype=dtype, **options)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    states = [torch.randn(4, B, n, dtype=dtype, requires_grad=True) for n in (rnn.proj_size or H, H)]
    return rnn, x, states if kind == "LSTM" else states[:1]


def equal(a, b):
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_run_after_run(kind, size, isa):
    rnn, x, hx = case(kind, size)
    every = [*hx, x, *rnn.parameters()]
    first = None
    for _ in range(4):
        output, _ = rnn(x, tuple(hx) if len(hx) == 2 else hx[0])
        found = [output, *torch.autograd.grad(output.square().sum(), every)]
        first = first or found
        assert equal(found, first)
        junk = [torch.full((n,), float("nan")) for n in (10, 1000, 100_000)]  # other memory, other leftovers
        del junk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN], ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "LSTM projected"])
def test_any_thread_count(kind, size, dtype, isa):
    kind, *projected = kind.split()
    rnn, x, hx = case(kind, size, dtype, **({"proj_size": size[3] // 2 + 1} if projected else {}))
    first = None
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        found = forward_and_gradients(rnn, x, hx)
        first = first or found
        assert equal(found, first), threads


@pytest.mark.parametrize("kind", KINDS)
def test_any_thread_count_with_everything_on(kind, isa):
    T, B = 7, 9
    rnn, x, hx = case(kind, (T, B, 11, 40))
    options = dict(reset=torch.rand(T, B) < 0.3, lengths=torch.randint(0, T + 1, (B,)), all_states=True)
    first = None
    for threads in (1, 2, 3, 5, 16):
        torch.set_num_threads(threads)
        found = forward_and_gradients(rnn, x, hx, **options)
        first = first or found
        assert equal(found, first), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind, dtype, isa):
    rnn, x, hx = case(kind, (6, 19, 9, 33), dtype)
    whole = forward_and_gradients(rnn, x, hx, weights=False)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 19), [18, 2, 2, 5]):
        part_x = x.detach()[:, rows].requires_grad_()
        part_hx = [h.detach()[:, rows].requires_grad_() for h in hx]
        part = forward_and_gradients(rnn, part_x, part_hx, weights=False)
        assert equal(part, [t[:, rows] for t in whole]), rows


def test_many_python_threads_at_once():
    cases = [case(kind, size) for kind in KINDS for size in SIZES[:2]]
    expected = [forward_and_gradients(*c) for c in cases]

    def work(i):
        return all(equal(forward_and_gradients(*cases[k]), expected[k]) for k in (i % 8, (i + 3) % 8, (i + 5) % 8))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(48), timeout=120))


# In a process of its own.

BODY = """
import os, sys, threading, torch, fastrnn
torch.manual_seed(0)
rnns = [fastrnn.LSTM(9, 128, 2, bidirectional=True), fastrnn.GRU(9, 40), fastrnn.RNN(9, 256)]
x = torch.randn(20, 6, 9)
def run():
    found = []
    for rnn in rnns:
        rnn.zero_grad()
        output, _ = rnn(x)
        output.square().sum().backward()
        found += [output.detach(), rnn.weight_hh_l0.grad.clone()]
    return found
def same(a, b):
    return all(p.equal(q) for p, q in zip(a, b))
"""


def child(body, timeout=120, **environment):
    source = textwrap.dedent(BODY) + textwrap.dedent(body) + "\nprint('finished')\n"
    variables = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", source], env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("finished\n")
    return done.stdout


REPEAT = """
torch.set_num_threads(1)
alone = run()
torch.set_num_threads({threads})
for _ in range(10):
    assert same(run(), alone)
"""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OMP_THREAD_LIMIT": "2"},
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_DYNAMIC": "true"},
        {"OMP_DYNAMIC": "true", "OMP_THREAD_LIMIT": "3"},
        {"OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "true"},
        {"OMP_NUM_THREADS": "16", "OMP_NESTED": "true"},
    ],
    ids=str,
)
def test_no_hang_with_more_threads_than_cores(environment):
    child(REPEAT.format(threads=16), **environment)


def test_inside_someone_elses_parallel_region(tmp_path):
    """Called from two workers of an OpenMP region that a C library opened: serial there, right, and no hang."""
    source = tmp_path / "region.cpp"
    source.write_text(
        'extern "C" int region(void (*body)(int)) {\n'
        "  int n = 0;\n#pragma omp parallel for num_threads(2) reduction(+ : n)\n"
        "  for (int i = 0; i < 2; i++) { body(i); n++; }\n  return n;\n}\n"
    )
    library = tmp_path / "libregion.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-fopenmp", str(source), "-o", str(library)], check=True)
    body = f"""
    import ctypes
    torch.set_num_threads(4)
    with torch.no_grad():
        alone = [rnn(x)[0] for rnn in rnns]
    found = {{}}
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def call(i):
        with torch.no_grad():
            found[i] = [rnn(x)[0] for rnn in rnns]
    region = ctypes.CDLL({str(library)!r}).region
    for _ in range(5):
        found.clear()
        assert region(call) == 2
        assert same(found[0], alone) and same(found[1], alone)
    with torch.no_grad():
        assert same([rnn(x)[0] for rnn in rnns], alone)
    """
    child(body)


def test_eight_python_threads_in_a_process_with_sixteen_workers():
    body = """
    torch.set_num_threads(16)
    with torch.no_grad():
        alone = [rnn(x)[0] for rnn in rnns]
    bad = []
    def work():
        with torch.no_grad():
            for _ in range(5):
                if not same([rnn(x)[0] for rnn in rnns], alone):
                    bad.append(1)
    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not bad
    """
    child(body)


def test_after_fork():
    """The parent's pool does not exist in the child: our kernels run serially there instead of waiting for it."""
    body = """
    torch.set_num_threads(2)
    with torch.no_grad():
        alone = [rnn(x)[0] for rnn in rnns]
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                ok = same([rnn(x)[0] for rnn in rnns], alone)
                os._exit(0 if ok else 3)
            assert os.waitpid(pid, 0)[1] == 0
        assert same([rnn(x)[0] for rnn in rnns], alone)
    """
    child(body)


def test_backward_kernels_after_fork():
    """Every gradient; on one Python thread, for torch's own threads of backward are gone in the child."""
    body = """
    torch.set_num_threads(2)
    rnn, given = rnns[1], x.clone().requires_grad_()
    def gradients():
        return torch.autograd.grad(rnn(given)[0].square().sum(), [given, *rnn.parameters()])
    with torch.autograd.set_multithreading_enabled(False):
        alone = gradients()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if same(gradients(), alone) else 3)
        assert os.waitpid(pid, 0)[1] == 0
    """
    child(body)


def test_data_loader_workers():
    body = """
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, i):
            with torch.no_grad():
                return rnns[1](x)[0]
    run()
    alone = run()[2]
    for batch in torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork"):
        assert batch[0].equal(alone)
    """
    child(body)


def test_the_thread_count_can_change_between_forward_and_backward():
    rnn, x, hx = case("GRU", SIZES[1])
    torch.set_num_threads(1)
    expected = forward_and_gradients(rnn, x, hx)
    torch.set_num_threads(16)
    outs = tensors_in(rnn(x, hx[0]))
    torch.set_num_threads(3)
    grads = torch.autograd.grad(sum(o.double().square().sum() for o in outs), [x, *hx, *rnn.parameters()])
    assert equal([*outs, *grads], expected)


def test_a_thread_that_ends_leaves_the_others_alone():
    """The arena a thread used goes with it, and not from under another."""
    rnn, x = fastrnn.LSTM(9, 40), torch.randn(5, 3, 9)
    with torch.no_grad():
        expected = rnn(x)[0]
        for _ in range(50):
            found = []
            thread = threading.Thread(target=lambda found=found: found.append(rnn(x)[0]))
            thread.start()
            thread.join(30)
            assert not found[0].requires_grad or found[0].detach().equal(expected)
            assert found[0].equal(expected)
            assert rnn(x)[0].equal(expected)
