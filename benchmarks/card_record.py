"""A stage's JSON, and what every stage of benchmarks/card.py is given."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import card_facts
import card_watch

ROOT = card_facts.ROOT


def _terminal():
    """fastrnn/terminal.py without the package, whose library may not be built yet."""
    spec = importlib.util.spec_from_file_location("fastrnn_terminal", ROOT / "fastrnn" / "terminal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


terminal = _terminal()


class Record:
    """A stage's JSON: {"stage", "conditions", "ok", "complete", "seconds", "items": name -> result, ...}."""

    def __init__(self, folder: Path, stage: str, conditions: dict):
        self.path, self.saved, self.lock = folder / f"{stage}.json", 0.0, threading.RLock()
        self.begin = time.monotonic()
        same = ("sources", "card", "torch")
        try:
            before = json.loads(self.path.read_text())
        except (OSError, ValueError):
            before = None
        resumed = before is not None and all(before["conditions"].get(k) == conditions.get(k) for k in same)
        self.data = before if resumed else {"stage": stage, "items": {}, "seconds": 0.0}
        self.data |= {"conditions": conditions, "ok": False, "complete": False, "error": None}
        self.data.pop("left_out", None)
        self.before = self.data["seconds"]
        self.save()

    @property
    def items(self) -> dict:
        return self.data["items"]

    def put(self, name: str, result: dict) -> None:
        with self.lock:
            self.items[name] = result
            if time.monotonic() - self.saved > 1.0:
                self.save()

    def save(self) -> None:
        with self.lock:
            self.data["seconds"] = round(self.before + time.monotonic() - self.begin, 1)
            new = self.path.with_suffix(".tmp")
            new.write_text(json.dumps(self.data, indent=1) + "\n")
            new.replace(self.path)
            self.saved = time.monotonic()

    def end(self, ok: bool, complete: bool, error: str | None = None) -> None:
        self.data |= {"ok": bool(ok), "complete": bool(complete), "error": error, "clocks_after": card_facts.clocks()}
        self.save()


def good(result: dict) -> bool:
    """Of an item's result: it need not be done again."""
    return "failed" not in result and result.get("outcome", "passed") == "passed" and result.get("right", True)


@dataclass
class Run:
    """What every stage is given."""

    out: Path
    conditions: dict
    minutes: float
    jobs: int
    seconds: float  # of timing for each measurement
    test_arguments: tuple[str, ...] = ()
    test_seconds: float = 150.0  # of a test that has not hung
    watch: Callable = card_watch.watch
    run: Callable = card_watch.run

    def record(self, stage: str) -> Record:
        return Record(self.out, stage, self.conditions)

    def deadline(self) -> float:
        return time.monotonic() + 60 * self.minutes

    def scratch(self, name: str) -> Path:
        folder = self.out / "logs"
        folder.mkdir(exist_ok=True)
        return folder / name

    def environment(self) -> dict:
        paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def read(self, stage: str) -> dict:
        """What a stage has found on the same sources, or nothing."""
        try:
            found = json.loads((self.out / f"{stage}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if found["conditions"].get("sources") == self.conditions.get("sources") else {}
