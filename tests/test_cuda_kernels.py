"""The CUDA side without a card: a C++ driver that runs csrc/cuda on the CPU, through an emulator.

The driver (tests/csrc/cuda_driver.cpp) is compiled here with the .cu files' own sources and tests/csrc/emulator.cpp:
plainly, for AddressSanitizer, and for ThreadSanitizer, for which every thread of a kernel is a thread; without
optimisation where the compiler would take longer than the run saves. The CPU kernels that it compares with are tested
by test_kernels.py, and compiled once.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "csrc"
CSRC = Path(__file__).parent.parent / "csrc"
CPU = [CSRC / "cpu" / f"{name}.cpp" for name in ("scalar", "plan", "dispatch", "workspace")]
CUDA = [
    *sorted((CSRC / "cuda").glob("*.cu")),
    *sorted(path for path in (CSRC / "cuda").glob("*.cpp") if path.stem != "runtime"),  # the emulator is the runtime
    TESTS / "emulator.cpp",
    TESTS / "cuda_driver.cpp",
]
FLAGS = {
    "none": ["-O1"],
    "address": ["-O0", "-fsanitize=address"],
    "thread": ["-O0", "-fsanitize=thread"],
}
RUNS = [
    ("none", "layers", "40"),
    ("none", "resident", "8"),
    ("none", "stacks", "12"),
    ("none", "plans", "100"),
    ("none", "long"),
    ("address", "layers", "5"),
    ("address", "resident", "1"),
    ("address", "stacks", "1"),
    ("thread", "layers", "4"),
    ("thread", "resident", "1", "3"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Builds the driver for each sanitizer and runs it, all side by side; returns what each run said."""
    folder = tmp_path_factory.mktemp("cuda_driver")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-g1", "-pthread", "-w"]

    def compile_one(source, name, flags):
        target = folder / f"{name}-{source.name}.o"
        subprocess.run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    def link(name, objects):
        files = [future.result() for future in objects]
        subprocess.run([*compiler, *FLAGS[name], *files, "-o", str(folder / name)], check=True)

    def run(linked, name, *arguments):
        linked.result()
        return subprocess.run([folder / name, *arguments], capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # which begins things in this order: the longest first
        slowest = pool.submit(compile_one, CPU[0], "cpu", ["-O0"])
        objects = {
            name: [pool.submit(compile_one, source, name, flags) for source in CUDA]
            for name, flags in reversed(FLAGS.items())
        }
        cpu = [slowest, *(pool.submit(compile_one, source, "cpu", ["-O0"]) for source in CPU[1:])]
        linked = {name: pool.submit(link, name, [*cpu, *objects[name]]) for name in FLAGS}
        found = {arguments: pool.submit(run, linked[arguments[0]], *arguments) for arguments in RUNS}
        return {arguments: future.result() for arguments, future in found.items()}


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_driver(results, arguments):
    result = results[arguments]
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("ok")
