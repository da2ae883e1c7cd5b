"""Calls past torch's dispatcher: references, threads, forks, signals, and arguments that nobody passes."""

import copy
import gc
import multiprocessing
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import fastrnn._C as _C
import pytest
import torch
from conftest import normal, tensors_in
from test_direct import H, I, arguments, clones, make
from torch import nn

import fastrnn
from fastrnn import direct

pytestmark = pytest.mark.skipif(not direct.AVAILABLE, reason="this torch has no C exchange API of DLPack")


def keeps_no_reference(calls, watched):
    """200 calls lose or keep no reference to what is watched, and leave no objects behind."""
    calls(10)
    gc.collect()
    before, objects = [sys.getrefcount(o) for o in watched], len(gc.get_objects())
    calls(200)
    gc.collect()
    after = [sys.getrefcount(o) for o in watched]
    assert all(abs(a - b) < 50 for a, b in zip(before, after)), list(zip(before, after))
    assert abs(len(gc.get_objects()) - objects) < 100


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_no_reference_is_lost_or_kept(name, frozen):
    module = make(name, frozen=frozen)
    x, hx = arguments(module)
    one = x if name.endswith("Cell") else x[0]
    stack, sequence = fastrnn.GRU(I, H, 4, bidirectional=True), normal(3, 5, I)
    start, reset = clones(hx), torch.tensor([True, False, False, True, False])
    strided = tensors_in(hx)[0].double()
    watched = [
        x,
        one,
        *tensors_in(hx),
        *tensors_in(start),
        *module.parameters(),
        reset,
        module.__dict__,
        None,
        True,
        False,
    ]
    watched += [strided] + ([module._frozen.packed, module._frozen.sources] if frozen else [])

    def calls(n):
        for _ in range(n):
            module(x, hx)
            module(x)
            stack(sequence)
            module.step(one, hx)
            module.step(one, hx, reset=reset, reset_state=start)
            _C.forward("lstm", module.__dict__, False, x, strided)
            _C.step_onto("gru", module.__dict__, True, one, strided, None, None)

    with torch.no_grad():
        keeps_no_reference(calls, watched)


def test_python_threads():
    """Several threads step the same module, and one writes its weights' memory anew; each result is somebody's."""
    module = fastrnn.GRU(128, 128).eval().freeze()
    x, hx = arguments(module, 4)
    with torch.no_grad():
        expected = module(x, hx)
        others = copy.deepcopy(module)

        def work(_):
            with torch.no_grad():
                return all(torch.equal(module(x, hx)[0], expected[0]) for _ in range(300))

        def thaw():  # takes the packed weights from under the others
            for _ in range(300):
                others.__dict__.pop("_frozen", None)
                others.freeze()

        def use():
            with torch.no_grad():
                for _ in range(300):
                    assert torch.allclose(others(x, hx)[0], expected[0], atol=1e-5)

        threads = [threading.Thread(target=thaw), threading.Thread(target=use)]
        for t in threads:
            t.start()
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(6)))
        for t in threads:
            t.join()


def in_child(queue, module, x, hx):
    with torch.no_grad():
        queue.put([t.tolist() for t in tensors_in(module(x, hx))])


def test_in_a_forked_child():
    module = make("LSTM")
    x, hx = arguments(module)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=in_child, args=(queue, module, x, hx))
    child.start()
    found = queue.get()
    child.join(60)
    assert child.exitcode == 0
    with torch.no_grad():
        assert found == [t.tolist() for t in tensors_in(module(x, hx))]


def test_arguments_of_the_functions():
    with pytest.raises(TypeError, match="forward: expected 5 arguments, got 1"):
        _C.forward("gru")
    with pytest.raises(TypeError, match="step_onto: expected 7 arguments, got 0"):
        _C.step_onto()
    with pytest.raises(TypeError, match="use_torch: expected 6 arguments, got 2"):
        _C.use_torch(1, 2)
    with pytest.raises(TypeError, match="use_torch: expected two types"):
        _C.use_torch(1, 2, 3, 4, 5, 6)
    assert _C.use_torch(int, int, None, (), {}, None) is False  # and what was there stays
    module = make("GRU")
    x, hx = arguments(module)
    for cell in ("rnn", "", None, 3, "lstm"):
        assert _C.forward(cell, module.__dict__, True, x, hx) is None
    for other in (None, 3, {}, {"_parameters": 3}, module):
        assert _C.forward("gru", other, True, x, hx) is None
    for name in (
        "_flat_weights_names",
        "_parameters",
        "input_size",
        "hidden_size",
        "num_layers",
        "proj_size",
        "_frozen",
    ):
        for value in (3, -1, 2**40, 2**80, "x", [], [[]] * 4, ["weight_ih_l0"] * 4, {}):
            if value != module.__dict__.get(name):
                attributes = {**module.__dict__, name: value}
                assert _C.forward("gru", attributes, True, x, hx) is None, (name, value)
    for name in ("dropout", "bias", "batch_first", "bidirectional", "training", "num_layers", "proj_size"):
        attributes = {k: v for k, v in module.__dict__.items() if k != name}
        assert _C.forward("gru", attributes, True, x, hx) is None, name  # a class may compute it
        if name != "bias":
            assert _C.forward("gru", {**attributes, name: None}, True, x, hx) is None, name
    assert _C.forward("gru", module.__dict__, True, x, hx) is not None


def test_weights_replaced_by_another_thread():
    """Each result is that of some weights, and all memory is somebody's."""
    module = make("GRUCell")
    x, h = arguments(module)
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            module.weight_hh = nn.Parameter(torch.zeros(3 * H, H))
            module.bias_hh = nn.Parameter(torch.zeros(3 * H))

    replace_once = threading.Thread(target=replace)
    with torch.no_grad():
        module.weight_hh.zero_()
        module.bias_hh.zero_()
        expected = module(x, h)
        replace_once.start()
        try:
            assert all(torch.equal(module(x, h), expected) for _ in range(20000))
        finally:
            stop.set()
            replace_once.join()


@pytest.mark.parametrize("allowed", ["none", "bf16"])
def test_no_signal_is_lost(allowed):
    """An exception that a signal's handler raises in the middle of a call comes out of it."""
    script = """
        import signal, sys, torch, fastrnn
        torch.backends.mkldnn.rnn.fp32_precision = sys.argv[1]
        class Alarm(Exception): pass
        def alarm(*_): raise Alarm
        signal.signal(signal.SIGALRM, alarm)
        cell = fastrnn.GRUCell(7, 19)
        x, h, seen = torch.ones(2, 7), torch.ones(2, 19), 0
        with torch.no_grad():
            for _ in range(200):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-3)
                    for _ in range(10**7):
                        cell(x, h)
                except Alarm:
                    seen += 1
        print(seen)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), allowed], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.strip() == "200", found.stderr


def test_in_a_forked_child_in_deterministic_mode():
    """Where torch fills new memory, by threads that the child has not."""
    script = """
        import os, torch, fastrnn
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(2)
        cell = fastrnn.GRUCell(8, 1024)
        x, h = torch.ones(64, 8), torch.ones(64, 1024)
        with torch.no_grad():
            expected = cell(x, h).numpy().tobytes()
            torch.ones(1 << 20).sum()
            child = os.fork()
            if not child:
                os._exit(0 if cell(x, h).numpy().tobytes() == expected else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "0", found.stderr


def test_without_the_exchange_api():
    """The same numbers by the operators."""
    script = """
        import torch
        del torch.Tensor.__dlpack_c_exchange_api__
        import fastrnn
        assert fastrnn.direct.AVAILABLE is False
        with torch.no_grad():
            for name in ("LSTM", "GRUCell"):
                for frozen in (False, True):
                    ours, theirs = (getattr(m, name)(7, 19).eval() for m in (fastrnn, torch.nn))
                    theirs.load_state_dict(ours.state_dict())
                    ours = ours.freeze() if frozen else ours
                    h = torch.randn(1, 5, 19) if name == "LSTM" else torch.randn(5, 19)
                    hx = (h, h + 1) if name == "LSTM" else h
                    x = torch.randn(*h.shape[:-1], 7)
                    torch.testing.assert_close(ours(x, hx), theirs(x, hx))
                    ours.step(x[0] if name == "LSTM" else x, hx)
        print("done")
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and found.stdout.strip() == "done", found.stderr
