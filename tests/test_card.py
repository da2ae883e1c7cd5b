"""benchmarks/card.py without a card: its lists, what happens to children that hang or crash, stages that stop and go
on, the numbers it would time, the table of requirements and the figure, on made-up results.
"""

import json
import random
import sys
import time
import types
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import card
import card_facts
import card_record
import card_report
import card_stages
import card_time
import card_watch
import card_work
from test_cuda_accuracy import SHAPES

CONDITIONS = {"commit": "abc", "dirty": False, "sources": "0123", "card": "Made-up GPU", "capability": "9.0",
              "torch": "2.11.0", "cudnn": 91900, "clocks": None}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return card_record.Run(tmp_path, dict(CONDITIONS), minutes=1.0, jobs=2, seconds=0.01)


def made_up(ratios=None):
    """Rows of every workload as card_time.measure gives them; ratios: "name | precision | mode" -> ratio or None."""
    r, rows = random.Random(0), {}
    for w in card_work.WORKS:
        for item in w.items():
            _, precision, mode = card_work.of_item(item)
            ratio = (ratios or {}).get(item, r.uniform(0.8, 6.0))
            cudnn = r.uniform(1.0, 12.0) * (3 if mode == "training" else 1)
            us = {"cuDNN": cudnn}
            best = None
            if ratio is not None:
                best = r.choice(card_work.PATHS[1:])
                us |= {"step": cudnn * r.uniform(0.9, 1.6) + cudnn / ratio, best: cudnn / ratio}
            times = {n: {"median": t * 1e-6 * w.T * w.L, "q1": t * 0.99e-6 * w.T * w.L, "q3": t * 1.02e-6 * w.T * w.L,
                         "rounds": 9, "calls": 1} for n, t in us.items()}  # fmt: skip
            rows[item] = {"name": w.name, "group": w.group, "cell": w.cell, "precision": precision, "mode": mode,
                          "variant": w.variant, "reset": w.reset, **{k: getattr(w, k) for k in "BTIHLD"},
                          "times": times, "us": us, "best": best, "ratio": ratio, "left_out": {}, "error": {},
                          "plans": {}}  # fmt: skip
    return rows


def write_times(run, ratios=None):
    rows = made_up(ratios)
    for stage in ("bench", "rl", "packed"):
        record = run.record(stage)
        for item in card_work.items(stage):
            record.items[item] = rows[item]
        record.end(True, True)


# ------------------------------------------------------------------------------------------------------------ the list


def test_the_tests_are_there():
    assert all((card_facts.ROOT / name).exists() for name in card_stages.TESTS)
    assert card_stages.path_of("tests/test_cuda_accuracy.py::test_shape[LSTM-1x1-grid-tf32]") == "grid"
    assert card_stages.path_of("tests/test_cuda_modules.py::test_the_switch_refuses_nonsense") is None


def test_the_list_is_sound():
    assert len(card_work.BY_NAME) == len(card_work.WORKS)
    for w in card_work.WORKS:
        assert w.group in ("bench", "rl", "packed") and hasattr(torch.nn, w.cell)
        assert set(w.precisions) <= set(card_work.PRECISIONS) == set(card_report.PRECISIONS)
        assert bool(w.variant) == (w.group == "packed") and bool(w.reset) == (w.group == "rl")
        for item in w.items():
            assert card_work.of_item(item)[0] is w
    every = [item for group in ("bench", "rl", "packed") for item in card_work.items(group)]
    assert len(every) == len(set(every)) == len(made_up())
    for requirement in card_work.REQUIREMENTS:
        assert set(requirement.works) <= set(card_work.BY_NAME)
        assert card_report.judged(requirement, [])["expected"] > 0, requirement.name


H100 = (90, 132, 232_448)  # what the plan wants to know of a card


def by(path, cell, precision, shape, backward):
    """Whether the plan for an H100 gives a layer to this path."""
    T, B, I, H, D = shape
    dtype, tf32 = ("float32", precision == "tf32") if precision in ("tf32", "float32") else (precision, False)
    card_time._C.set_gpu_path(path)
    try:
        found = card_time._C.gpu_plan(cell, dtype, tf32, backward, T, B, I, H, H, D, H100)
    finally:
        card_time._C.set_gpu_path("")
    return found["path"] == path


@pytest.mark.parametrize("precision", card_work.PRECISIONS)
@pytest.mark.parametrize("path", card_work.PATHS[1:])
def test_the_shapes_of_the_tests_reach_every_path(path, precision):
    """Forward and back: tests that all fall to `step` would show nothing of a path."""
    for cell in ("rnn_tanh", "lstm", "gru"):
        shapes = [(T, B, I, H, D) for T, B, I, H, _, D in SHAPES]
        served = [s for s in shapes if all(by(path, cell, precision, s, back) for back in (False, True))]
        # In strict float32 one block has room for little.
        least, rows = (6, 16) if (path, precision) == ("block", "float32") else (7, 60) if path == "block" else (13, 60)
        assert len(served) >= least, served
        assert any(s[3] % 8 for s in served) and any(s[4] == 2 for s in served) and any(s[1] >= rows for s in served)
        assert all(by(path, cell, precision, (T, B, I, H, 1), False) for T, B, I, H in card_time.SMOKE[:2])
        assert by(path, cell, precision, (70_000, 1, 3, 18, 1), True)


def test_every_workload_has_a_path_that_keeps_its_weights_on_the_chip():
    """But for float32 of the widest layers."""
    for w in card_work.WORKS:
        cell = {"RNN": "rnn_tanh"}.get(w.cell, w.cell.lower())
        for precision in w.precisions:
            if w.H < 1024 or precision in ("bfloat16", "float16"):
                shape = w.T, w.B, w.I, w.H, w.D
                assert any(by(path, cell, precision, shape, False) for path in ("block", "cluster", "grid")), w


# ------------------------------------------------------------------------------------------------------------ children

CHILD = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from card_watch import Journal
journal = Journal()
for item in {items!r}:
    journal.begin(item)
    if item == "hang": time.sleep(100)
    if item == "crash": os._exit(9)
    if item == "lose":
        journal.end(item, {{"failed": "illegal memory access"}})
        sys.exit(77)
    journal.end(item, {{"value": len(item)}})
print("the end of the log")
sys.exit({status})
"""


def child(*items, status=0):
    benchmarks = str(Path(card.__file__).parent)
    return [sys.executable, "-c", CHILD.format(benchmarks=benchmarks, items=items, status=status)]


@pytest.mark.parametrize(
    ("items", "status", "how", "at"),
    [
        (("a", "bb"), 0, "done", None),
        (("a", "hang", "bb"), 0, "hung", "hang"),
        (("a", "crash", "bb"), 0, "crashed", "crash"),
        (("a", "lose", "bb"), 0, "lost", None),
        (("a",), 4, "crashed", None),
    ],
)
def test_children(tmp_path, items, status, how, at):
    found = {}
    ended = card_watch.watch(
        child(*items, status=status), tmp_path / "child", found.__setitem__, item_seconds=0.5,
        deadline=time.monotonic() + 60,
    )  # fmt: skip
    assert (ended.how, ended.item) == (how, at)
    assert found["a"] == {"value": 1}
    assert ("bb" in found) == (how == "done")
    if how == "done":
        assert "the end of the log" in ended.tail


def test_a_deadline_ends_a_child(tmp_path):
    begin = time.monotonic()
    ended = card_watch.watch(
        child("a", "hang"), tmp_path / "child", lambda *_: None, item_seconds=60, deadline=begin + 1.0
    )
    assert (ended.how, ended.item) == ("stopped", "hang")
    assert time.monotonic() - begin < 20
    status, _, _ = card_watch.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 0.3)
    assert status is None


# -------------------------------------------------------------------------------------------------------------- stages

TESTS = """
import os, pathlib, time
import pytest

@pytest.mark.parametrize("path", ["step", "grid"])
@pytest.mark.parametrize("n", range(5))
def test_numbers(n, path, record_property):
    record_property("float32", '{"share": 0.5, "ratio": 1.0}')
    if path == "grid":
        time.sleep(100)

def test_crash():
    if not pathlib.Path("mended").exists():
        os._exit(9)

def test_wrong():
    assert pathlib.Path("mended").exists(), "CUDA error: an illegal memory access was encountered"

def test_after():
    pass

@pytest.mark.skip(reason="needs two GPUs")
def test_two():
    pass
"""


def test_tests_hang_crash_and_go_on(run, tmp_path, monkeypatch):
    """The stage that tests: each hung or crashed test is one failure, a path that goes on hanging is left out, and what
    passed is not run again."""
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "tests" / "test_cuda_some.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(card_stages, "ROOT", root)
    monkeypatch.setattr(card_stages, "TESTS", ["tests/test_cuda_some.py"])
    run.test_seconds, run.jobs = 1.0, 1
    record = card_stages.tests(run).data
    assert record["counts"] == {"crashed": 1, "failed": 1, "hung": 3, "left out": 2, "passed": 6, "skipped": 1}
    assert record["complete"] and not record["ok"]
    assert record["collected"] == 14
    name = "tests/test_cuda_some.py::"
    assert record["items"][name + "test_after"]["outcome"] == "passed"
    assert "illegal memory" in record["items"][name + "test_wrong"]["message"]
    assert record["worst"]["step float32"]["share"] == 0.5
    assert json.loads((tmp_path / "tests.json").read_text())["items"] == record["items"]

    (root / "mended").touch()
    ran = []

    def watch(command, scratch, end, **options):
        ran.extend(part for part in command if "::" in part)
        return card_watch.watch(command, scratch, end, **options)

    run.watch = watch
    run.test_arguments = ("-k", "not numbers")
    record = card_stages.tests(run).data
    assert sorted(ran) == [name + "test_crash", name + "test_two", name + "test_wrong"]
    assert record["counts"] == {"passed": 3, "skipped": 1} and record["ok"] and record["complete"]


def fake_watch(results):
    """Stands in for a child of card_time.py. results: item -> result, or "hung", "crashed"."""
    requests = []

    def watch(command, scratch, end, **options):
        request = json.loads(Path(command[-1]).read_text())
        requests.append(request)
        for item in request["items"]:
            found = results(item)
            if isinstance(found, str):
                return card_watch.Ended(found, item, None, "the end of its log")
            end(item, found)
        return card_watch.Ended("done", None, 0, "")

    watch.requests = requests
    return watch


def test_items_of_a_stage_are_resumed(run):
    """A child that hangs is replaced by one without that item; next time only what failed is done again."""
    names = ["a", "b", "c", "d"]
    run.watch = fake_watch(lambda item: "hung" if item == "b" else {"failed": "no"} if item == "c" else {"value": item})
    record = card_stages.work_off(run, "smoke", names, {}, 1.0).data
    assert [r["items"] for r in run.watch.requests] == [names, ["c", "d"]]
    assert record["items"]["b"] == {"failed": "hung", "tail": "the end of its log"}
    assert not record["ok"] and record["complete"]
    run.watch = fake_watch(lambda item: {"value": item})
    record = card_stages.work_off(run, "smoke", names, {}, 1.0).data
    assert [r["items"] for r in run.watch.requests] == [["b", "c"]]
    assert record["ok"] and record["complete"]
    # Other sources: nothing of it counts.
    run.conditions["sources"] = "4567"
    run.watch = fake_watch(lambda item: {"value": item})
    card_stages.work_off(run, "smoke", names, {}, 1.0)
    assert run.watch.requests[0]["items"] == names


def test_a_stage_whose_time_is_up_is_unfinished(run):
    def watch(command, scratch, end, **options):
        end("a", {"value": 1})
        return card_watch.Ended("stopped", "b", None, "")

    run.watch = watch
    record = card_stages.work_off(run, "smoke", ["a", "b"], {}, 1.0).data
    assert not record["complete"] and not record["ok"]
    assert "unfinished" in card.state(record)


def test_a_child_that_does_nothing_is_an_error(run):
    run.watch = lambda *a, **k: card_watch.Ended("done", None, 1, "ImportError: no such thing")
    record = card_stages.work_off(run, "smoke", ["a"], {}, 1.0).data
    assert "ImportError" in record["error"] and card.state(record) == "▼ failed"


def test_only_what_smoke_found_right_is_timed(run):
    run.watch = fake_watch(lambda item: {"right": item == "cluster | LSTM tf32", "served": 1})
    card_stages.smoke(run)
    right = json.loads((run.out / "paths.json").read_text())
    assert right["cluster"]["LSTM tf32"] and sum(sum(of.values()) for of in right.values()) == 1
    run.watch = fake_watch(lambda item: {"ratio": 1.0})
    record = card_stages.STAGES["packed"](run).data
    assert record["ok"] and run.watch.requests[0]["right"] == right
    run.conditions["sources"] = "4567"  # smoke's results are of other sources
    record = card_stages.STAGES["packed"](run).data
    assert not record["ok"] and "smoke first" in record["error"]


def test_every_stage_writes_its_json_and_the_next_one_runs(run, monkeypatch, capsys):
    """The whole, with children that are made up: sanitizer and micro on a machine that has the tools, a stage that
    raises, the exit status, the summary."""
    rows = made_up()

    def result(item):
        return {"right": True, "served": 5} if item in smoked else rows[item]

    smoked = {f"{path} | {cell} {p}" for path in card_work.PATHS for cell in card_work.CELLS
              for p in (*card_work.PRECISIONS, "float64")}  # fmt: skip

    def execute(command, log, seconds, environment=None, cwd=None):
        text = ""
        if "setup.py" in command:
            assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0a" and environment["FASTRNN_CUDA"] == "1"
        elif command[0].endswith("hops"):
            text = '{"flags_ns": {"2": 560.0}}'
        elif "small" in command:
            assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            text = "========= ERROR SUMMARY: 0 errors\n"
        elif "-c" in command:
            text = '{"cuda_architectures": ["9.0a"]}'
        log.write_text(text)
        return 0, 1.0, text

    run.run, run.watch = execute, fake_watch(result)
    monkeypatch.setattr(card_stages.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(card_stages.importlib.util, "find_spec", lambda name: None)

    def broken(run):
        """Raises."""
        raise RuntimeError("pytest did not collect the tests")

    monkeypatch.setitem(card_stages.STAGES, "tests", broken)
    assert card.run_stages(run, list(card_stages.STAGES)) == 1
    for stage in card_stages.STAGES:
        record = json.loads((run.out / f"{stage}.json").read_text())
        assert record["stage"] == stage
        assert record["conditions"] == CONDITIONS
        assert record.keys() >= {"items", "seconds", "ok", "complete", "error"}
        assert record["ok"] == (stage != "tests"), (stage, record)
    assert (run.out / "cuda.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["stages"]["tests"] == "▼ failed" and summary["stages"]["bench"] == "good"
    assert len(summary["requirements"]) == len(card_work.REQUIREMENTS)
    told = capsys.readouterr().out
    assert "pytest did not collect" in told and "everything in this list" in told and "LSTM B16 H512" in told
    assert card.run_stages(run, ["bench", "figure"]) == 0


def test_what_a_sanitizer_reports_is_a_failure(run, monkeypatch):
    def execute(command, log, seconds, environment=None, cwd=None):
        if "racecheck" in command:
            log.write_text("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n")
            return 86, 1.0, log.read_text()
        log.write_text("" if "synccheck" in command else "========= ERROR SUMMARY: 0 errors\n")
        return (None if command[-1] == "grid" else 0), 1.0, ""

    run.run = execute
    monkeypatch.setattr(card_stages.shutil, "which", lambda name: f"/usr/bin/{name}")
    items = card_stages.sanitizer(run).data["items"]
    assert "failed" not in items["memcheck | step"]
    assert "2 hazards" in items["racecheck | step"]["summary"][0] and "failed" in items["racecheck | step"]
    assert "reported nothing" in items["synccheck | step"]["failed"]
    assert "too long" in items["memcheck | grid"]["failed"]


# ------------------------------------------------------------------------------------------------------------- timing


@pytest.fixture
def on_cpu(monkeypatch):
    """card_time.py on the CPU: every path is our CPU kernel, time is the host's."""
    monkeypatch.setattr(card_time.Case, "served", lambda self, path: (path, "made up"))
    monkeypatch.setattr(card_time.Case, "back", lambda self, path: path)

    def clock(call, calls):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls

    return clock


SMALL = [
    card_work.Work("dense", "bench", "LSTM", 3, 7, 5, 9, 2, 2),
    card_work.Work("plain", "bench", "RNN", 3, 7, 5, 9),
    card_work.Work("resets", "rl", "GRU", 4, 9, 5, 9, reset=0.3),
    card_work.Work("packed", "packed", "LSTM", 4, 9, 5, 9, variant="packed"),
    card_work.Work("lengths", "packed", "GRU", 4, 9, 5, 9, variant="lengths"),
]


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("w", SMALL, ids=lambda w: w.name)
def test_a_measurement(w, mode, on_cpu, monkeypatch):
    """The row it writes; and that what is compared is the same function, forward and back."""
    monkeypatch.setitem(card_work.BY_NAME, w.name, w)
    right = {path: {f"{w.cell} float32": path != "grid"} for path in card_work.PATHS}
    row = card_time.measure(f"{w.name} | float32 | {mode}", 0.01, right, on_cpu, "cpu")
    assert row.keys() == made_up()["LSTM B16 H512 | tf32 | forward"].keys()
    assert row["left_out"] == {"grid": "smoke did not find it right"}
    others = {"cuDNN without resets"} if w.reset else set()
    assert row["times"].keys() == {"cuDNN", "step", "block", "cluster"} | others
    assert row["best"] in ("step", "block", "cluster") and row["ratio"] > 0
    for path in ("step", "block", "cluster"):
        assert row["error"][path]["worst"] <= 1, row["error"]
    assert json.loads(json.dumps(row)) == row


def test_what_is_wrong_or_not_served_is_not_timed(on_cpu, monkeypatch):
    w = card_work.Work("dense", "bench", "LSTM", 3, 7, 5, 9)
    monkeypatch.setitem(card_work.BY_NAME, w.name, w)
    right = {path: {"LSTM float32": True} for path in card_work.PATHS}
    real = card_time.Case.output

    def output(self, name, module, x):
        return real(self, name, module, x) * (1.001 if name == "cluster" else 1)

    monkeypatch.setattr(card_time.Case, "output", output)
    monkeypatch.setattr(card_time.Case, "served", lambda self, path: ("step" if path == "grid" else path, "why"))
    row = card_time.measure("dense | float32 | forward", 0.01, right, on_cpu, "cpu")
    assert row["left_out"]["cluster"].startswith("wrong") and row["left_out"]["grid"] == "does not serve this: why"
    assert row["times"].keys() == {"cuDNN", "step", "block"}


@pytest.mark.parametrize("cell", card_work.CELLS)
def test_smoke(cell, on_cpu):
    found = card_time.smoke(f"step | {cell} float32", "cpu")
    assert found["right"] and found["served"] == len(card_time.SMOKE) == len(found["shapes"])


def test_which_path_serves_is_read_from_the_plan(monkeypatch):
    """As explain writes it: a line for each layer that begins with the path."""
    for splits, path in (
        (("step by step (a projection goes step by step)",), "step"),
        (("grid, 1 group of 8 blocks, 32 hidden units in each, 10 rows at a time (forced)",) * 2, "grid"),
        (("cluster, 2 groups of 4 blocks", "step by step (no)"), "several"),
        ((), ""),
    ):
        plan = types.SimpleNamespace(splits=splits)
        monkeypatch.setattr(card_time.fastrnn, "explain", lambda *a, plan=plan, **k: plan)
        assert card_time.served(None)[0] == path


def test_split_and_pad_is_what_resets_mean():
    torch.manual_seed(0)
    theirs = torch.nn.GRU(5, 9).double()
    ours = card_time.fastrnn.accelerate(torch.nn.GRU(5, 9).double())
    ours.load_state_dict(theirs.state_dict())
    x, reset = torch.randn(12, 6, 5, dtype=torch.float64), torch.rand(12, 6) < 0.3
    torch.testing.assert_close(card_time.split_and_pad(theirs, x, reset), ours(x, reset=reset)[0])


def test_an_error_is_the_result_of_its_item(tmp_path, monkeypatch):
    monkeypatch.setenv(card_watch.JOURNAL, str(tmp_path / "journal"))

    def function(item):
        if item == "bad":
            raise ValueError("no such size")
        if item == "gone":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"value": 1}

    assert card_time.work_off(["good", "bad", "gone", "never"], function) == card_watch.LOST
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    assert [line["end"] for line in lines if "end" in line] == ["good", "bad", "gone"]
    assert "no such size" in lines[3]["result"]["failed"]


# ------------------------------------------------------------------------------------------------------------- report


def test_requirements(run):
    slow = "LSTM B16 H512 | bfloat16 | forward"
    every = {item: 10.0 for w in card_work.WORKS for item in w.items()}

    def judge(times):
        rows = list(made_up(times).values())
        for row in rows:  # steps of no length, so that ratios alone decide
            row["us"] = {who: None if us is None else us / 1e3 for who, us in row["us"].items()}
        return {f["name"]: f for f in card_report.table(rows)}

    found = judge(every)
    assert all(f["met"] is True and f["served"] == f["expected"] for f in found.values())
    found = judge(every | {slow: 0.9})
    missed = {name for name, f in found.items() if f["met"] is False}
    named = "LSTM (16, 512), bfloat16 and float16"
    assert missed == {named, "everything in this list: never slower"}
    assert found[named]["least"] == 0.9 and "forward" in found[named]["slowest"]
    # Nothing of ours was right there: open, not met.
    assert judge(every | {slow: None})[named]["met"] is None
    assert all(f["met"] is None and f["rows"] == 0 for f in card_report.table([]))
    strict = card_work.Requirement("fast", ("LSTM B1 H256",), ("bfloat16",), us=1e-3)
    assert card_report.judged(strict, list(made_up(every).values()))["met"] is False
    assert strict.asked == "ratio >= 1, <= 0.001 µs"


def test_figure(run):
    write_times(run, {"LSTM B10 H256 L6 | float32 | forward": None})
    record = card_stages.figure(run).data
    assert record["ok"] and record["items"]["figure"]["rows"] == len(made_up())
    assert (run.out / "cuda.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_of_nothing(run):
    record = card_stages.figure(run).data
    assert not record["ok"] and "nothing was measured" in record["error"]


# ------------------------------------------------------------------------------------------------------------ the rest


def test_conditions_of_this_machine():
    found = card_facts.conditions("a name")
    assert found["commit"] == "a name" and found["torch"] == str(torch.__version__)
    assert found.keys() >= {"dirty", "sources", "card", "driver", "cuda", "cudnn", "clocks", "date", "nvcc", "python"}
    assert card_facts.output("no-such-command") is None


def test_without_a_card_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert card.main(["--stages", "figure", "--out", str(tmp_path / "deep" / "out")]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_command_line(capsys):
    assert card.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert "sanitizer" in told and "GRU RL B4096 T32 H256" in told
    for arguments in (["--stages", "dance"], ["--minutes", "0"], ["--jobs", "none"], ["--seconds", "soon"]):
        with pytest.raises(SystemExit) as stopped:
            card.main(arguments)
        assert stopped.value.code == 2
        assert "expected" in capsys.readouterr().err
