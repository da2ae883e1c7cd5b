"""The emulator that CUDA kernels run on where there is no card: tests/csrc/emulator_test.cpp, plain and sanitized.

What must work is run under many seeds; what must not is an error with its text, gives wrong results under some seed,
and is a data race to ThreadSanitizer.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_kernels import SANITIZERS

FOLDER = Path(__file__).parent / "csrc"
BUILDS = {"plain": [], **SANITIZERS}
RACES = [
    "sync_block",
    "release after sync_block",
    "sync_block after acquire",
    "second buffer",
    "wait_for_bytes",
    "sync_cluster after make_barrier",
    "sync_cluster before pushing there again",
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Builds the program plain and once per sanitizer; returns the paths."""
    folder = tmp_path_factory.mktemp("emulator")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-g1", "-pthread"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # kernels have nvcc's #pragma unroll

    def compile_one(build, name):
        target = folder / f"{build}-{name}.o"
        source = FOLDER / f"{name}.cpp"
        subprocess.run([*compiler, *warnings, *BUILDS[build], "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {
            build: [pool.submit(compile_one, build, name) for name in ("emulator_test", "emulator")] for build in BUILDS
        }
        for build, futures in objects.items():
            files = [future.result() for future in futures]
            subprocess.run([*compiler, *BUILDS[build], *files, "-o", str(folder / build)], check=True)
    return {build: folder / build for build in BUILDS}


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        ("plain", ["works", "300"]),
        ("plain", ["errors", "60"]),
        ("address", ["works", "40"]),
        ("address", ["errors", "60"]),
        ("thread", ["works", "12"]),
    ],
)
def test_program(programs, build, arguments):
    result = subprocess.run([programs[build], *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("ok")


@pytest.mark.parametrize("missing", RACES)
def test_missing_order_is_a_data_race(programs, missing):
    result = subprocess.run([programs["thread"], "race", missing], capture_output=True, text=True, timeout=120)
    assert result.returncode == 66, result.stdout[-3000:] + result.stderr[-3000:]
    first = result.stderr.split("==================")[1]
    assert "WARNING: ThreadSanitizer: data race" in first and "emulator_test.cpp" in first


def test_shared_memory_has_an_end(programs):
    result = subprocess.run([programs["address"], "race", "end of shared memory"], capture_output=True, text=True)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr and "emulator_test.cpp" in result.stderr
