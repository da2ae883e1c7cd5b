"""Where and of what the figures of benchmarks/card.py are: the card, its clocks as they are found, drivers and
libraries, and the sources. Run by itself it prints what only torch knows, so that the process that watches over the
others never opens the card.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc/**/*", "fastrnn/**/*.py", "tests/**/*", "benchmarks/card*.py", "setup.py")
# Read, never set.
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "power.limit",
          "utilization.gpu", "memory.used", "pstate")  # fmt: skip


def output(*command: str, seconds: float = 60.0, cwd: Path | None = None) -> str | None:
    """What a command prints; None when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def smi(*names: str) -> dict[str, str] | None:
    found = output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0")
    values = found.splitlines()[0].split(", ") if found else []
    return dict(zip(names, values)) if len(values) == len(names) else None


def clocks() -> dict[str, str] | None:
    return smi(*CLOCKS)


def sources() -> str:
    """A hash of what is built, tested and measured: results are of the same code where these agree."""
    sha = hashlib.sha256()
    files = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()}
    for path in sorted(files):
        if "__pycache__" not in path.parts and path.suffix not in (".so", ".o", ".pyc"):
            sha.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def of_torch() -> dict:
    """Of the card, by torch."""
    import torch

    found = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "cudnn": None, "card": None}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"cudnn": torch.backends.cudnn.version(), "card": p.name, "capability": f"{p.major}.{p.minor}",
                  "processors": p.multi_processor_count, "memory_mib": p.total_memory >> 20,
                  "cards": torch.cuda.device_count()}  # fmt: skip
    return found


def conditions(commit: str | None = None) -> dict:
    """commit: of a copy without its repository, by name."""
    found = output(sys.executable, str(Path(__file__).resolve()), seconds=180.0)
    nvcc = output("nvcc", "--version")
    status = output("git", "status", "--porcelain", cwd=ROOT)
    return {
        "commit": commit or output("git", "rev-parse", "HEAD", cwd=ROOT),
        "dirty": None if status is None else bool(status),
        "sources": sources(),
        **(json.loads(found.splitlines()[-1]) if found else {"torch": None, "card": None}),
        "driver": (smi("driver_version") or {}).get("driver_version"),
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "python": platform.python_version(),
        "clocks": clocks(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    print(json.dumps(of_torch()))
