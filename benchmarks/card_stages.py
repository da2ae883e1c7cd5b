"""The stages of benchmarks/card.py. Each takes a Run, keeps a Record, and can be stopped and started again."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import card_facts
import card_report
import card_work
from card_record import ROOT, Record, Run, good, terminal

TIMES = Path(__file__).with_name("card_time.py")
TESTS = [f"tests/test_cuda_{name}.py" for name in ("modules", "runtime", "sequences", "accuracy")]
CHUNK = 120  # tests of one child, which takes seconds to begin
TOO_MANY = 3  # hung tests of one path: its others are left out
SANITIZERS = ("memcheck", "racecheck", "synccheck")


# -------------------------------------------------------------------------------------------------------------- build


def build(run: Run) -> Record:
    """Compiles the package in place for this card's architecture alone."""
    record = run.record("build")
    capability = run.conditions.get("capability") or "9.0"
    architecture = "9.0a" if capability == "9.0" else capability
    environment = {**run.environment(), "FASTRNN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_ext", "--inplace"]
    status, seconds, tail = run.run(command, run.scratch("build.log"), 60 * run.minutes, environment, ROOT)
    result = {"architecture": architecture, "status": status, "seconds": round(seconds, 1)}
    if status == 0:
        code = "import json, fastrnn; print(json.dumps(fastrnn.build_info(), default=str))"
        status, _, text = run.run([sys.executable, "-c", code], run.scratch("import.log"), 180, environment, ROOT)
        result["build_info"] = json.loads(text.splitlines()[-1]) if status == 0 else None
        tail = tail if status == 0 else text
        spills = re.compile(r"(\d+) bytes spill stores")
        logs = {log.name: log.read_text(errors="replace") for log in ROOT.glob("build/*/cuda/*.cu.o.log")}
        result["spilling"] = {name: sum(int(n) > 0 for n in spills.findall(text)) for name, text in logs.items()}
    ok = status == 0 and bool(result.get("build_info", {}).get("cuda_architectures"))
    if not ok:
        result |= {"failed": "no CUDA kernels were built" if status == 0 else "see tail", "tail": tail}
    record.put("build", result)
    record.end(ok, ok)
    return record


# -------------------------------------------------------------------------------------------------------------- tests


def collect(run: Run) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *TESTS]
    log = run.scratch("collect.log")
    status, _, tail = run.run([*command, *run.test_arguments], log, 300, run.environment(), ROOT)
    found = [line for line in log.read_text().splitlines() if "::" in line and line.startswith("tests/")]
    if status != 0 or not found:
        raise RuntimeError(f"pytest did not collect the tests (status {status}):\n{tail}")
    return found


def path_of(test: str) -> str | None:
    """The path that a test is about, from its name."""
    words = re.split(r"[-\[\]]", test.partition("::")[2])
    return next((path for path in card_work.PATHS if path in words), None)


def tests(run: Run) -> Record:
    """The tests on a GPU, some in each child: one that hangs or takes the context with it is one failure."""
    record, deadline = run.record("tests"), run.deadline()
    every = collect(run)
    passed = {name for name, result in record.items.items() if good(result)}
    # What has not run comes before what failed last time.
    left = sorted((name for name in every if name not in passed), key=lambda name: name in record.items)
    chunks = [left[i : i + CHUNK] for i in range(0, len(left), CHUNK)]
    hung, lock, number = dict.fromkeys(card_work.PATHS, 0), threading.Lock(), [0]
    done = len(every) - len(left)

    def finish(name: str, result: dict) -> None:
        nonlocal done
        with lock:
            record.put(name, result)
            done += 1
            failed = sum(r["outcome"] != "passed" for r in record.items.values())
            progress.update("tests", done, f"{failed} not passed")

    threads = max(1, (os.cpu_count() or 1) // run.jobs)
    environment = {**run.environment(), "OMP_NUM_THREADS": str(threads)}

    def work(names: list[str]) -> None:
        while names and time.monotonic() < deadline:
            left_out = [name for name in names if hung.get(path_of(name), 0) >= TOO_MANY]
            for name in left_out:
                finish(name, {"outcome": "left out", "message": f"{TOO_MANY} tests of this path hung"})
            names = [name for name in names if name not in left_out]
            if not names:
                return
            with lock:
                number[0] += 1
                scratch = run.scratch(f"tests-{number[0]}")
            seen: set[str] = set()
            options = ["-p", "card_watch", "-p", "no:cacheprovider", "-q", "--tb=short", "--no-header"]
            command = [sys.executable, "-m", "pytest", *options, *names]

            def end(name: str, result: dict, seen=seen) -> None:
                seen.add(name)
                finish(name, result)

            ended = run.watch(
                command, scratch, end, item_seconds=run.test_seconds, deadline=deadline, cwd=ROOT,
                environment=environment,
            )  # fmt: skip
            if ended.how == "stopped":
                return
            if ended.item is not None:
                seen.add(ended.item)
                finish(ended.item, {"outcome": ended.how, "message": ended.tail})
                with lock:
                    if ended.how == "hung" and path_of(ended.item):
                        hung[path_of(ended.item)] += 1
            elif not seen:  # nothing ran at all
                for name in names:
                    finish(name, {"outcome": ended.how, "message": ended.tail[-800:]})
                return
            names = [name for name in names if name not in seen]

    with terminal.Progress({"tests": len(every)}) as progress:
        with concurrent.futures.ThreadPoolExecutor(run.jobs) as pool:
            list(pool.map(work, chunks))
    outcomes = [record.items[name]["outcome"] for name in every if name in record.items]
    counts = {kind: outcomes.count(kind) for kind in sorted(set(outcomes))}
    allowed = sum(r["outcome"] == "skipped" and "two GPUs" in r.get("message", "") for r in record.items.values())
    record.data |= {"counts": counts, "collected": len(every), "worst": worst_of(record.items)}
    fine = counts.get("passed", 0) + allowed
    record.end(fine == len(outcomes), len(outcomes) == len(every))
    return record


def worst_of(items: dict) -> dict:
    """For each path and dtype the test that came nearest to its bound, and the mean of error over cuDNN's error."""
    found: dict[str, dict] = {}
    for name, result in items.items():
        for dtype, text in result.get("measured", {}).items():
            try:
                measured = json.loads(text)
            except (TypeError, ValueError):
                continue
            key = f"{path_of(name) or 'any'} {dtype}"
            if measured["share"] > found.get(key, {}).get("share", -1.0):
                found[key] = {"share": measured["share"], "ratio": measured["ratio"], "test": name}
    return found


# ---------------------------------------------------------------------------------------------- what card_time.py does


def work_off(run: Run, stage: str, names: list[str], request: dict, item_seconds: float) -> Record:
    """Items in children of card_time.py, one child at a time: times want the card for themselves."""
    record, deadline = run.record(stage), run.deadline()
    left = sorted((n for n in names if not good(record.items.get(n, {"failed": ""}))), key=lambda n: n in record.items)
    total, error = len(names), None
    with terminal.Progress({stage: total}) as progress:

        def end(name: str, result: dict) -> None:
            record.put(name, result)
            if name in left:
                left.remove(name)
            progress.update(stage, total - len(left), name)

        while left and time.monotonic() < deadline:
            before = len(left)
            path = run.scratch(f"{stage}.request")
            path.write_text(json.dumps({**request, "items": left}))
            ended = run.watch(
                [sys.executable, str(TIMES), stage, str(path)], run.scratch(stage), end, item_seconds=item_seconds,
                deadline=deadline, cwd=ROOT, environment=run.environment(),
            )  # fmt: skip
            if ended.how == "stopped":
                break
            if ended.item is not None:
                end(ended.item, {"failed": ended.how, "tail": ended.tail})
            elif len(left) == before or (left and ended.how == "done"):
                error = f"the child ended with status {ended.status}:\n{ended.tail}"
                break
    complete = all(name in record.items for name in names)
    record.end(complete and error is None and all(good(record.items[n]) for n in names), complete, error)
    return record


def smoke(run: Run) -> Record:
    """Is each path right, for each cell and precision? Only what is right is timed later: paths.json."""
    kinds = [f"{cell} {precision}" for cell in card_work.CELLS for precision in card_work.PRECISIONS]
    names = [f"{path} | {kind}" for path in card_work.PATHS for kind in kinds]
    names += [f"step | {cell} float64" for cell in card_work.CELLS]
    record = work_off(run, "smoke", names, {}, 60)
    (run.out / "paths.json").write_text(json.dumps(right_paths(record.items), indent=1) + "\n")
    return record


def right_paths(items: dict) -> dict:
    """path -> "cell precision" -> whether smoke found it right."""
    found: dict[str, dict[str, bool]] = {path: {} for path in card_work.PATHS}
    for name, result in items.items():
        path, what = name.split(" | ")
        found[path][what] = bool(result.get("right", False))
    return found


def times(stage: str) -> Callable[[Run], Record]:
    def measure(run: Run) -> Record:
        smoked = run.read("smoke")
        if not smoked:
            record = run.record(stage)
            record.end(False, False, "nothing is timed that smoke has not found right: run the stage smoke first")
            return record
        request = {"seconds": run.seconds, "right": right_paths(smoked["items"])}
        return work_off(run, stage, card_work.items(stage), request, 90)

    measure.__doc__ = {
        "bench": "The list of card_work.py: cuDNN and every path that is right, forward and training.",
        "rl": "Training with resets inside the sequence, beside cuDNN with split-and-pad.",
        "packed": "PackedSequence and lengths.",
    }[stage]
    return measure


def flashrnn(run: Run) -> Record:
    """FlashRNN, as a peer, where it is installed (pip install a carried wheel first)."""
    if importlib.util.find_spec("flashrnn") is None:
        record = run.record("flashrnn")
        record.data["left_out"] = "flashrnn is not installed"
        record.end(True, True)
        return record
    return work_off(run, "flashrnn", list(card_work.FLASHRNN), {"seconds": run.seconds}, 240)


# --------------------------------------------------------------------------------------------- sanitizer, micro, figure


def sanitizer(run: Run) -> Record:
    """compute-sanitizer's memcheck, racecheck and synccheck over small layers on each path."""
    record, deadline = run.record("sanitizer"), run.deadline()
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        record.data["left_out"] = "compute-sanitizer is not on this machine"
        record.end(True, True)
        return record
    # Our kernels alone: torch's and cuBLAS's own would take all the time. Older tools have the option by another name.
    older = "--kernel-name" not in (card_facts.output(tool, "--help") or "--kernel-name")
    chosen = ["--kernel-regex" if older else "--kernel-name", "kns=fastrnn"]
    names = [f"{check} | {path}" for check in SANITIZERS for path in card_work.PATHS]
    with terminal.Progress({"sanitizer": len(names)}) as progress:
        for i, name in enumerate(names):
            if good(record.items.get(name, {"failed": ""})) or time.monotonic() > deadline:
                continue
            check, path = name.split(" | ")
            command = [tool, "--tool", check, "--report-api-errors", "no", "--error-exitcode", "86", *chosen]
            seconds = max(5.0, min(240.0, deadline - time.monotonic()))
            environment = {**run.environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command += [sys.executable, str(TIMES), "small", path]
            log = run.scratch(f"sanitizer-{check}-{path}.log")
            status, taken, tail = run.run(command, log, seconds, environment, ROOT)
            text = log.read_text(errors="replace") if log.exists() else ""
            summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
            result = {"status": status, "seconds": round(taken, 1), "summary": summary}
            if status != 0:
                result |= {"failed": "killed: it took too long" if status is None else "see tail", "tail": tail}
            elif not summary:
                result |= {"failed": "the tool reported nothing: did it run?", "tail": tail}
            record.put(name, result)
            progress.update("sanitizer", i + 1, f"{name}: {(summary or ['-'])[-1]}")
    complete = all(name in record.items for name in names)
    record.end(complete and all(good(record.items[name]) for name in names), complete)
    return record


def micro(run: Run) -> Record:
    """What one hop between blocks costs: flags, a barrier of the whole grid, a push within a cluster."""
    record = run.record("micro")
    if shutil.which("nvcc") is None:
        record.data["left_out"] = "nvcc is not on this machine"
        record.end(True, True)
        return record
    capability = run.conditions.get("capability") or "9.0"
    name = "90a" if capability == "9.0" else capability.replace(".", "")
    program, source = run.scratch("hops"), Path(__file__).with_name("card_hops.cu")
    target = f"arch=compute_{name},code=sm_{name}"
    command = ["nvcc", "-O3", "-std=c++17", "-gencode", target, "-o", str(program), str(source)]
    status, _, tail = run.run(command, run.scratch("hops-build.log"), 300, run.environment())
    if status == 0:
        status, _, tail = run.run([str(program)], run.scratch("hops.log"), 120, run.environment())
    result = {"status": status}
    try:
        result["hops"] = json.loads(tail) if status == 0 else None
    except ValueError:
        status = -1
    if status != 0:
        result |= {"failed": "see tail", "tail": tail}
    record.put("hops", result)
    record.end(status == 0, status == 0)
    return record


def figure(run: Run) -> Record:
    """The figure of all times, from the JSON of bench, rl and packed."""
    record = run.record("figure")
    rows = card_report.rows_of({stage: run.read(stage) for stage in ("bench", "rl", "packed")})
    if not rows:
        record.end(False, False, "nothing was measured yet: run bench, rl or packed first")
        return record
    c = run.conditions
    title = f"fastrnn's paths beside cuDNN: {c.get('card')}, torch {c.get('torch')}, cuDNN {c.get('cudnn')}"
    card_report.draw(rows, title, run.out / "cuda.png")
    record.put("figure", {"file": "cuda.png", "rows": len(rows)})
    record.end(True, True)
    return record


STAGES: dict[str, Callable[[Run], Record]] = {
    "build": build, "smoke": smoke, "tests": tests, "sanitizer": sanitizer, "bench": times("bench"), "rl": times("rl"),
    "packed": times("packed"), "micro": micro, "flashrnn": flashrnn, "figure": figure,
}  # fmt: skip
