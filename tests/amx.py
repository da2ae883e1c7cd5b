"""The kernels that go by AMX's tiles, on a machine without AMX: an emulator of the instructions (tests/csrc/
amx_emulator.cpp) to preload, and a process in which the tier "amx" is the one in use.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
TIER, BENEATH = "amx", "avx512_bf16"  # what the tier leaves alone goes to the kernels of the other
PRODUCTS = 5  # the emulator's number for products of tiles


def build(folder: Path) -> str:
    """Compiles the emulator into `folder`; why it cannot be is what the text of the RuntimeError says."""
    compiler, target = os.environ.get("CXX", "g++"), folder / "libamx.so"
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no {compiler}")
    source = str(TESTS / "csrc" / "amx_emulator.cpp")
    flags = ["-std=c++17", "-O2", "-pthread", "-shared", "-fPIC", "-DFASTRNN_PRELOAD"]
    subprocess.run([compiler, *flags, source, "-o", str(target), "-ldl"], check=True)
    return str(target)


def products() -> int:
    """How many products of tiles have been emulated; -1 where they are the machine's own."""
    try:
        count = ctypes.CDLL(None).fastrnn_amx_count
    except AttributeError:
        return -1
    count.restype = ctypes.c_long
    return count(PRODUCTS)


def run_python(preload: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python with these arguments, where the tier is in use; preload: "" for none."""
    environment = {**os.environ, "FASTRNN_ISA": TIER, "FASTRNN_TESTS_EMULATE": preload, **environment}
    if preload:
        environment["LD_PRELOAD"] = os.pathsep.join(filter(None, [preload, os.environ.get("LD_PRELOAD")]))
    return subprocess.run([sys.executable, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True)


def run_tests(preload: str, *arguments: str) -> subprocess.CompletedProcess:
    """pytest with these arguments, likewise. On one thread, but where a test asks for more: others are at work."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "amx_plugin"]
    return run_python(preload, "-m", "pytest", *options, *arguments, OMP_NUM_THREADS="1")
