"""`python -m fastrnn bench`: the frozen list, the measuring, the peers' agreement with torch.nn, what is reported."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, replace

import fastrnn._C as _C
import pytest
import torch
from programs import is_whole_png

from fastrnn import bench_report, measure, peers, roofline, workloads
from fastrnn.__main__ import main
from fastrnn.workloads import Workload

by_name = {w.name: w for w in workloads.ALL}


# ---------------------------------------------------------------------------------------------------- the list


def test_the_list_is_frozen():
    """Figures are compared by name over the years. Whoever changes the list changes this, and says so in CHANGELOG."""
    assert workloads.fingerprint() == "eb1f052e2c3cfa53"
    with pytest.raises(FrozenInstanceError):
        workloads.ALL[0].H = 1


def test_the_list_is_sound():
    assert len(by_name) == len(workloads.ALL)
    assert set(workloads.QUICK) <= set(by_name)
    assert {w.group for w in workloads.ALL} == set(workloads.GROUPS)
    for w in workloads.ALL:
        assert hasattr(torch.nn, w.cell)
        assert w.family in ("RNN", "LSTM", "GRU")
        assert w.T == w.L == w.D == 1 or not w.cell.endswith("Cell")
        assert set(w.modes) <= {"inference", "training"}
        assert min(w.B, w.T, w.I, w.H, w.L, w.D) >= 1
        assert bool(w.variant) == (w.group == "ragged")
        assert bool(w.reset) == (w.group == "reset")
    for cell in ("RNN", "LSTM", "GRU"):
        assert workloads.select("workloads", cell)


def test_select():
    assert workloads.select() == list(workloads.ALL)
    assert [w.name for w in workloads.select(quick=True)] == [n for n in by_name if n in workloads.QUICK]
    assert {w.group for w in workloads.select("grid")} == {"grid"}
    assert {w.cell for w in workloads.select("workloads", "GRU")} == {"GRU", "GRUCell"}
    assert [w.name for w in workloads.select(only="KOKORO")] == ["Kokoro speech synthesis"]
    assert workloads.select(only="no such workload") == []


# ---------------------------------------------------------------------------------------------------- measuring


def small(w: Workload) -> Workload:
    """The same kind of workload at a size that takes no time."""
    return replace(w, T=min(w.T, 6), B=min(w.B, 3), H=min(w.H, 8), I=min(w.I, 5), P=min(w.P, 4), L=min(w.L, 2))


KINDS = {(w.cell, w.group, w.variant, w.D, bool(w.P), w.state, w.L > 1): small(w) for w in workloads.ALL}


@pytest.mark.parametrize("w", KINDS.values(), ids=lambda w: f"{w.name}")
def test_both_contenders_compute_the_same(w):
    """What is timed is the same function: every kind of workload, output and all gradients, against float64."""
    case = measure.Case(w, torch.float32)
    gradients = "training" in w.modes
    truth = case.results("torch", torch.float64, gradients)
    for name in ("torch", "fastrnn"):
        found = case.results(name, torch.float32, gradients)
        assert found.keys() == truth.keys()
        for key in truth:
            assert (found[key] - truth[key]).norm() <= 1e-5 * truth[key].norm(), (name, key)
    if gradients:
        assert ("input" in truth) == w.input_gradient
    for mode in w.modes:
        for name in case.contenders():
            with torch.set_grad_enabled(mode == "training"):
                case.call(name, mode)()
                case.call(name, mode)()
    if gradients:
        assert all(p.grad is not None for p in case.modules["fastrnn"].parameters())


def test_resets_are_really_there():
    w = replace(small(by_name["LSTM T96 B8 H128 reset"]), reset=0.5)
    case = measure.Case(w, torch.float32)
    assert case.done[1:].any()
    with torch.no_grad():
        plain, reset = (case.output(n, case.modules["fastrnn"], case.x, None) for n in ("plain", "fastrnn"))
    assert not torch.equal(plain, reset)


def test_new_lengths_come_at_every_call():
    case = measure.Case(replace(small(by_name["GRU B8 H64 new lengths"]), T=40), torch.float32)
    seen = []
    real = case.output
    case.output = lambda *arguments: (seen.append(arguments[4].tolist()), real(*arguments))[1]
    call = case.call("fastrnn", "inference")
    with torch.no_grad():
        for _ in range(4):
            call()
    assert len({tuple(lengths) for lengths in seen}) > 1
    assert all(10 <= n <= 40 for lengths in seen for n in lengths)


def test_operations():
    w = Workload("", "grid", "LSTM", B=2, T=3, I=5, H=7)
    forward = 2 * 3 * 2 * 4 * 7 * (5 + 7)
    assert measure.operations(w, "inference") == forward
    assert measure.operations(w, "training") == 3 * forward
    assert measure.operations(replace(w, input_gradient=False), "training") == 3 * forward - 2 * 3 * 2 * 4 * 7 * 5
    two = replace(w, cell="GRU", L=2, D=2)
    assert measure.operations(two, "inference") == 2 * 3 * 2 * 2 * 3 * 7 * ((5 + 7) + (14 + 7))
    projected = replace(w, P=4)
    assert measure.operations(projected, "inference") == 2 * 3 * 2 * (4 * 7 * (5 + 4) + 7 * 4)


@pytest.mark.parametrize("way", [measure.interleave, measure.apart])
def test_timing(way):
    """The slower contender comes out slower, by about as much; short calls are timed several at a time."""
    calls = {"short": lambda: None, "long": lambda: time.sleep(2e-3)}
    found = way(calls, 0.1, random.Random(0))
    assert found["long"]["median"] > 2e-3 > 50 * found["short"]["median"]
    assert found["short"]["calls"] > 10
    assert found["long"]["calls"] == 1
    for timing in found.values():
        assert timing["rounds"] >= 5
        assert timing["q1"] <= timing["median"] <= timing["q3"]


def test_summary():
    found = measure.summary([4.0, 1.0, 2.0, 3.0, 5.0], calls=2)
    assert (found["median"], found["rounds"], found["calls"]) == (3.0, 5, 2)
    assert 1.0 <= found["q1"] < 3.0 < found["q3"] <= 5.0
    assert measure.summary([7.0], 1)["q1"] == measure.summary([7.0], 1)["q3"] == 7.0


def test_error_ratio():
    truth = torch.ones(4, dtype=torch.float64)
    assert measure.error_ratio(truth + 2e-3, truth + 1e-3, truth) == pytest.approx(2)
    assert measure.error_ratio(truth, truth, truth) == 1
    assert measure.error_ratio(truth + 1e-3, truth, truth) > 1e5  # torch.nn's luck is not a licence
    found = measure.errors(small(by_name["DeepAR"]), torch.float32)
    assert 0.1 < found["output"] < 10
    assert 0.1 < found["gradient"] < 10
    assert found["worst_gradient"].startswith(("weight", "bias", "input"))


# ---------------------------------------------------------------------------------------------------- peers


@pytest.fixture(params=peers.PEERS, ids=lambda peer: peer.name)
def peer(request):
    missing = request.param.missing()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: peers are an optional extra")
    return request.param


SERVED = [w for w in KINDS.values() if peers.OnnxRuntime.serves(w, torch.float32)]


@pytest.mark.parametrize("w", SERVED, ids=lambda w: f"{w.name}")
def test_a_peer_computes_what_torch_computes(peer, w):
    contender = peer(measure.Case(w, torch.float32))
    assert contender.difference() <= 1e-5


def test_a_wrong_peer_is_left_out(peer):
    class Wrong(peer):
        def run(self):
            return super().run() + 0.01

    w = small(by_name["darts GRU"])
    case = measure.Case(w, torch.float32)
    found = measure.beside(Wrong, case, 0.01, random.Random(0))
    assert found.keys() == {"left_out"}
    assert "differs" in found["left_out"]
    assert measure.beside(peer, case, 0.01, random.Random(0))["ratio"] > 0


def test_what_peers_cannot_do_is_not_asked_of_them():
    for peer in peers.PEERS:
        assert peer.serves(by_name["darts GRU"], torch.float32)
        for name in ("icefall encoder, streaming", "GRU B8 H64 packed", "GRU T96 B8 H128 reset"):
            assert not peer.serves(by_name[name], torch.float32)
        assert not peer.serves(by_name["darts GRU"], torch.float16)


# ---------------------------------------------------------------------------------------------------- reports


def row(name, *, group="grid", cell="LSTM", B=1, H=64, **modes):
    """A made-up row: modes are inference=ratio, training=ratio, ort=ratio, plain=ratio."""
    found = {"name": name, "group": group, "cell": cell, "B": B, "T": 1, "I": H, "H": H, "L": 1, "D": 1, "P": 0}
    for mode in ("inference", "training"):
        if mode in modes:
            found[mode] = {"ratio": modes[mode]}
    if "ort" in modes:
        found["inference"]["peers"] = {"ONNX Runtime": {"ratio": modes["ort"], "ratio_not_frozen": modes["ort"] / 2}}
    if "plain" in modes:
        found["training"]["over_plain"] = modes["plain"]
    return found


ROWS = [
    row("a", cell="LSTM", B=1, H=64, inference=2.0, training=4.0, ort=1.0),
    row("b", cell="LSTM", B=64, H=512, inference=0.5, training=0.9),
    row("c", cell="GRU", B=1, H=64, inference=8.0, training=16.0, ort=4.0),
    row("d", cell="RNNCell", B=2, H=64, inference=2.0, training=4.0, ort=100.0),
    row("e", cell="LSTM", B=16, H=64, inference=4.0, training=2.0),
    row("f", cell="GRU", B=32, H=128, training=0.5),
    row("g", group="ragged", cell="LSTM", B=8, H=64, inference=3.0, training=10.0),
    row("h", group="ragged", cell="GRU", B=32, H=128, training=40.0),
    row("i", group="ragged", cell="GRU", B=32, H=256, training=6.0),
    row("j", group="ragged", cell="GRU", B=64, H=512, training=2.0),
    row("k", group="reset", cell="GRU", B=8, H=128, training=9.0, plain=1.02),
    row("l", group="reset", cell="LSTM", B=8, H=128, training=16.0, plain=1.02),
]


def test_targets():
    found = {t.name: (t.goal, t.found, t.rows, t.met) for t in bench_report.targets(ROWS)}
    near = pytest.approx
    assert found == {
        "inference, GRU and RNN": (3.0, near(4.0), 2, True),
        "inference, LSTM": (1.3, near(4.0 ** (1 / 3)), 3, True),
        "inference, LSTM from 32 rows on": (1.0, near(0.5), 1, False),
        "training, GRU and RNN, H <= 256, B*H <= 2000": (6.0, near(8.0), 2, True),
        "training, LSTM, H <= 256, B*H <= 512": (3.0, near(4.0), 1, True),
        "training, others of H <= 256": (1.2, near(1.0), 2, False),
        "inference, frozen, over ONNX Runtime, one row": (1.5, near(2.0), 2, True),
        "inference, not frozen, over ONNX Runtime, one row": (1.5, near(1.0), 2, False),
        "training, ragged rows, B*H <= 4096": (10.0, near(20.0), 2, True),
        "training, ragged rows, B 32, H 256": (5.0, near(6.0), 1, True),
        "training, ragged rows, B 64, H 512": (2.5, near(2.0), 1, False),
        "training with resets over a loop of torch.nn": (10.0, near(12.0), 2, True),
        "training with resets, time over without": (1.05, near(1.02), 2, True),
        "the slowest ratio of all": (0.95, 0.5, 18, False),
    }
    nothing = bench_report.targets([])
    assert all(t.found is None and t.met is None and t.rows == 0 for t in nothing)


def test_means():
    found = bench_report.means(ROWS[:4])
    assert found["inference"]["LSTM"] == {
        "rows": 2, "over_torch": pytest.approx(1.0), "slowest": 0.5, "peers": {"ONNX Runtime": pytest.approx(1.0)}
    }  # fmt: skip
    assert found["inference"]["RNN"]["over_torch"] == pytest.approx(2.0)  # an RNNCell counts as RNN
    assert found["training"]["all"]["over_torch"] == pytest.approx((4.0 * 0.9 * 16.0 * 4.0) ** 0.25)
    assert bench_report.geometric_mean([]) is None


def test_busy_processors():
    code = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.2)
        assert bench_report.busy_processors() > 0.2
    finally:
        other.kill()
        other.wait()


# ---------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("isa", _C.isas())
def test_limits_are_positive_and_finite(isa):
    _C.set_isa(isa)
    for value in (
        _C.limit("fma"),
        _C.limit("load", 16 << 10),
        _C.limit("load", 1),
        _C.limit(what="load", bytes=8 << 20),
    ):
        assert 0 < value < 1e5  # no core does 100 TF/s: such a figure means that the loop was dropped
        assert math.isfinite(value)


def test_limits_refuse_nonsense():
    for arguments in (("divide",), ("load",), ("load", -5)):
        with pytest.raises(ValueError, match="expected"):
            _C.limit(*arguments)


def test_the_limits_of_the_machine():
    found = roofline.limits()
    assert found["fma"] > 0
    assert all(level["bandwidth"] > 0 for level in found["levels"])
    assert roofline.on_all_threads("fma", 0, 2) > 0
    if found["levels"]:
        assert roofline.level_of(1, found) is found["levels"][0]
        assert roofline.level_of(1e15, found)["name"] == "memory"


def test_tiles_raise_the_roof(tmp_path):
    level = {"name": "L1", "bytes": None, "bandwidth": 50.0}
    found = {"fma": 100.0, "tiles": 1800.0, "levels": [level]}
    assert roofline.peak(found, "float32") == (300, "tiles")  # six products of bfloat16 for one
    assert roofline.peak(found, "bfloat16") == (1800, "tiles")
    assert roofline.peak(found | {"tiles": None}, "float32") == (100, "fma")
    assert roofline.peak(found | {"tiles": 540.0}, "float32") == (100, "fma")
    gflops = {"fastrnn": 150.0}
    rows = [
        {"cell": "LSTM", "T": 10, "L": 1, "recurrent_weights": 100, "inference": {"operations": n, "gflops": gflops}}
        for n in (1e4, 1e6)  # 2.5 and 250 operations for a byte of weights
    ]
    roofline.add_shares(rows, found, "float32")
    assert [row["inference"]["roof"]["gflops"] for row in rows] == [125, 300]
    roofline.draw(rows, found, "two roofs", tmp_path / "roof.png")
    assert is_whole_png(tmp_path / "roof.png")


def test_caches_from_sysfs(tmp_path):
    one = min(roofline.affinity())
    entries = [
        ("Data", 1, "48K", f"{one}"),
        ("Instruction", 1, "32K", f"{one}"),
        ("Unified", 2, "2048K", f"{one}-{one}"),
        ("Unified", 3, "1M", f"{one},40000-40095"),
        ("Unified", "", "", ""),
    ]
    for i, values in enumerate(entries):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in zip(("type", "level", "size", "shared_cpu_list"), values):
            (folder / name).write_text(f"{value}\n")
    assert roofline.caches(tmp_path) == [
        {"level": 1, "bytes": 48 << 10, "sharing": 1},
        {"level": 2, "bytes": 2 << 20, "sharing": 1},
        {"level": 3, "bytes": 1 << 20, "sharing": 1},
    ]
    assert roofline.caches(tmp_path / "nothing") == []


# ---------------------------------------------------------------------------------------------------- the command


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "fastrnn", "bench", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_two_rows(tmp_path):
    """From outside: the tables, the pictures, and everything the JSON promises."""
    command = ["--only", "darts", "--cell", "gru", "--seconds", "0.02", "--threads", "1", "--isa", "scalar"]
    files = ["--json", "found.json", "--figure", "ratios.png", "--roofline", "roof.png"]
    done = run(*command, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "darts GRU" in done.stdout
    assert "Targets" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "ratios.png", "roof.png"]
    for name in ("ratios.png", "roof.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    found = json.loads((tmp_path / "found.json").read_text())
    info = found["info"]
    assert (info["threads"], info["dtype"], info["isa"], info["seconds"]) == (1, "float32", "scalar", 0.02)
    assert info["workloads"] == workloads.fingerprint()
    assert info["versions"].keys() >= {"torch", "fastrnn", "onnxruntime", "openvino"}
    assert info.keys() >= {"cpu", "cores", "caches", "busy_before", "date", "commit"}
    assert found["interrupted"] is False
    assert found["roofline"]["fma"] > 0
    (result,) = found["rows"]
    assert [result[k] for k in ("name", "group", "cell")] == ["darts GRU", "workloads", "GRU"]
    assert [result[k] for k in "BTIHLDP"] == [32, 24, 1, 25, 1, 1, 0]
    for mode in ("inference", "training"):
        times = result[mode]["times"]
        assert times.keys() == {"torch", "fastrnn"}
        for name, timing in times.items():
            assert 0 < timing["q1"] <= timing["median"] <= timing["q3"]
            assert timing["rounds"] >= 5
            assert result[mode]["us_per_step"][name] == pytest.approx(timing["median"] * 1e6 / 24)
            assert result[mode]["gflops"][name] > 0
        assert result[mode]["ratio"] == pytest.approx(times["torch"]["median"] / times["fastrnn"]["median"])
        assert 0 < result[mode]["roof"]["share"]
    assert result["error"]["output"] > 0
    assert result["error"]["gradient"] > 0
    for peer in peers.PEERS:
        if not peer.missing():
            assert result["inference"]["peers"][peer.name]["ratio"] > 0
    assert {t["name"] for t in found["targets"] if t["found"] is not None} >= {"inference, GRU and RNN"}
    assert found["means"]["training"]["GRU"]["rows"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_special_rows(dtype, capsys, tmp_path):
    """In this process: ragged, reset and one-step rows, and 16 bits."""
    threads = torch.get_num_threads()
    try:
        for only in ("GRU B8 H64 lengths", "T96 B8 H128 reset", "GRU cell, one step"):
            path = tmp_path / f"{only}.json"
            arguments = ["--only", only, "--cell", "gru", "--dtype", dtype, "--seconds", "0.02", "--no-peers"]
            assert main(["bench", *arguments, "--json", str(path)]) == 0
            (result,) = json.loads(path.read_text())["rows"]
            if "reset" in only:
                assert result["training"]["over_plain"] > 0
                assert result["training"]["times"].keys() == {"torch", "fastrnn", "plain"}
            assert result["training"]["ratio"] > 0
    finally:
        torch.set_num_threads(threads)
    assert "GRU cell, one step" in capsys.readouterr().out


def test_list(capsys):
    assert main(["bench", "--list", "--only", "kokoro"]) == 0
    assert "hexgrad/kokoro" in capsys.readouterr().out


def test_peak_memory():
    from fastrnn import bench

    found = bench.peak_memory("GRU", "fastrnn", 1)
    output = bench.MEMORY["T"] * bench.MEMORY["B"] * bench.MEMORY["H"] * 4 / (1 << 20)
    assert output < found < 100 * output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--threads", "1000000"],
        ["--threads", "two"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--seconds", "soon"],
        ["--dtype", "float13"],
        ["--group", "nonsense"],
        ["--cell", "transformer"],
        ["--isa", "mmx"],
        ["--only", "no such workload"],
        ["--json", "no/such/folder/found.json"],
        ["--figure", "."],
        ["--nonsense"],
    ],
    ids=" ".join,
)
def test_bad_options_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    found = capsys.readouterr()
    assert len(found.err.strip().splitlines()) == 1
    assert "error" in found.err
    assert found.out == ""


def test_ctrl_c_prints_what_was_measured(tmp_path):
    arguments = ["--only", "darts", "--no-peers", "--seconds", "0.4", "--json", "x.json"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fastrnn", "bench", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        while not process.stderr.readline().startswith("2/"):
            assert process.poll() is None
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted: 1 of 3" in out
    assert "darts RNN" in out
    assert "Traceback" not in error
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["interrupted"] is True
    assert [r["name"] for r in found["rows"]] == ["darts RNN"]
