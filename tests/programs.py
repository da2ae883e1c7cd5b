"""What tests of programs share: loading an example, running it as a user does, reading what it prints and draws."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def run(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def is_whole_png(path):
    picture = path.read_bytes()
    return picture.startswith(b"\x89PNG") and picture.rstrip(b"\0")[-8:-4] == b"IEND"


def table(output, first):
    """The cells of the table's line that begins with `first`: the lines of progress have a slash."""
    lines = [line for line in output.splitlines() if line.startswith(first) and "/" not in line]
    assert len(lines) == 1, output
    return re.split(r"\s{2,}", lines[0])
