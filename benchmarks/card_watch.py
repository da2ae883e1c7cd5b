"""Runs children that may hang or crash on a GPU, item by item, and what such a child writes: a journal.

A kernel whose blocks wait for each other can wait for ever, and an illegal access takes the process's context with it.
So the items of a stage (tests, measurements) run in children, which write a line of JSON before an item and one after
it; `watch` reads along, kills a child that has been at one item for too long, and says which item that was. The module
is also a pytest plugin (`-p card_watch`), which writes the journal of a test run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

JOURNAL = "FASTRNN_CARD_JOURNAL"  # names the file, for the child
LOST = 77  # exit status of a child whose CUDA context is gone: what is left wants a new one
# After these errors every call of the process fails.
STICKY = re.compile(
    "illegal memory access|unspecified launch failure|misaligned address|device-side assert|illegal instruction|"
    "invalid program counter|illegal address|launch timed out|hardware stack error|CUBLAS_STATUS_EXECUTION_FAILED",
    re.IGNORECASE,
)


class Journal:
    """The child's side."""

    def __init__(self, path: str | None = None):
        path = path or os.environ.get(JOURNAL)
        self.file = open(path, "a", buffering=1) if path else None

    def write(self, **line) -> None:
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def begin(self, item: str) -> None:
        self.write(begin=item)

    def end(self, item: str, result: dict) -> None:
        self.write(end=item, result=result)


@dataclass
class Ended:
    """How a child ended: "done", "lost" (its context is gone), "crashed", "hung" (it was killed at `item`), "stopped"
    (the stage's time was up). item: what it was at."""

    how: str
    item: str | None
    status: int | None
    tail: str


def tail_of(path: Path, characters: int = 3000) -> str:
    try:
        return path.read_text(errors="replace")[-characters:]
    except OSError:
        return ""


def kill(process: subprocess.Popen) -> None:
    """The child and its own children: it leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def watch(
    command: list[str],
    scratch: Path,
    on_end: Callable[[str, dict], None],
    *,
    item_seconds: float,
    deadline: float,
    start_seconds: float = 120.0,
    environment: dict | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Runs a child that keeps a journal. scratch: a path without suffix for its journal and log. deadline: of
    time.monotonic(). start_seconds: how long it may take before its first item, and after its last."""
    journal, log = scratch.with_suffix(".journal"), scratch.with_suffix(".log")
    journal.write_text("")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {}), JOURNAL: str(journal)}
    item, since, rest, how = None, time.monotonic(), "", None
    with open(log, "w") as output, open(journal) as lines:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=cwd, start_new_session=True
        )
        try:
            while True:
                ended = process.poll() is not None  # before reading: what it wrote last is then there
                rest += lines.read()
                *whole, rest = rest.split("\n")
                for line in map(json.loads, whole):
                    since = time.monotonic()
                    item = line.get("begin")
                    if item is None:
                        on_end(line["end"], line["result"])
                if ended:
                    break
                now = time.monotonic()
                if now > deadline:
                    how = "stopped"
                elif now - since > (item_seconds if item is not None else start_seconds):
                    how = "hung"
                if how:
                    break
                time.sleep(0.05)
        finally:
            kill(process)
    status = process.returncode
    if how is None:
        # pytest: 0 all passed, 1 some failed; 5: none were left.
        how = "lost" if status == LOST else "done" if item is None and status in (0, 1, 5) else "crashed"
    return Ended(how, item, status, tail_of(log))


def run(command: list[str], log: Path, seconds: float, environment: dict | None = None, cwd: Path | None = None):
    """A child without a journal: (exit status, None when it was killed; seconds; the end of its output)."""
    begin = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=cwd, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill(process)
    return status, time.monotonic() - begin, tail_of(log)


# ------------------------------------------------------------------------------------------------- the pytest plugin


class _Tests:
    def __init__(self):
        self.journal, self.reports = Journal(), []

    def pytest_runtest_logstart(self, nodeid, location):
        self.reports = []
        self.journal.begin(nodeid)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)
        if report.when != "teardown":
            return
        failed = [r for r in self.reports if r.failed]
        skipped = [r for r in self.reports if r.skipped]
        text = failed[0].longreprtext[-2500:] if failed else ""
        result = {
            "outcome": "failed" if failed else "skipped" if skipped else "passed",
            "seconds": round(sum(r.duration for r in self.reports), 3),
            "measured": dict(report.user_properties),
        }
        if failed:
            result["message"] = text
        elif skipped:
            longrepr = skipped[0].longrepr
            result["message"] = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        self.journal.end(report.nodeid, result)
        if failed and STICKY.search(text):
            import pytest

            pytest.exit("the CUDA context is gone", returncode=LOST)


def pytest_configure(config):
    if os.environ.get(JOURNAL):
        config.pluginmanager.register(_Tests(), "card journal")
