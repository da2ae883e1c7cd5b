"""The emulator that kernels for Intel's AMX run on where the machine has none: tests/csrc/amx_emulator_test.cpp.

It is run plain, with each of the ways to multiply, and sanitized; with instructions rewritten to jumps and with a
signal for each; and preloaded into Python.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "csrc"
COMPILER = [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror"]
BUILDS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# Configures two tiles from Python's own memory and copies one row, in machine code called through ctypes.
PRELOADED = """
import ctypes, faulthandler, mmap, signal, sys
assert faulthandler.is_enabled()
count = ctypes.CDLL(None).fastrnn_amx_count
count.restype = ctypes.c_long
assert ctypes.c_int.in_dll(ctypes.CDLL(None), "fastrnn_emulates_amx").value == 1
code = bytes.fromhex(
    "c4e2784907"  # ldtilecfg (%rdi)
    "c4e27b4b0c26"  # tileloadd (%rsi), %tmm1
    "c4e27a4b0c22"  # tilestored %tmm1, (%rdx)
    "c4e27849c0c3"  # tilerelease; ret
)
area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
area.write(code)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
copy = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p)(start)
config = bytearray(64)
config[0], config[18], config[49] = 1, 8, 1  # palette; tile 1 has a row of 8 bytes
target = ctypes.create_string_buffer(9)
before = count(3)
for _ in range(3):
    copy(bytes(config), b"by tiles", target)
assert target.value == b"by tiles", target.value
assert before == -1 or (before == 0 and count(3) == 3 and count(4) == 3), count(3)  # -1: the machine's own AMX
if sys.argv[1:] == ["ill"]:
    area.write(b"\\x0f\\x0b")  # ud2, behind the code above
    ctypes.CFUNCTYPE(None)(start + len(code))()
if sys.argv[1:] == ["handler"]:  # Python's own handler is called, and told to others
    def handler(number, frame):
        print("handled", number == signal.SIGILL)
    signal.signal(signal.SIGILL, handler)
    assert signal.getsignal(signal.SIGILL) is handler
    signal.raise_signal(signal.SIGILL)
    copy(bytes(config), b"by tiles", target)
print("ok")
"""


def compile_file(name, target, *flags):
    subprocess.run([*COMPILER, *flags, str(FOLDER / f"{name}.cpp"), "-o", str(target)], check=True)
    return str(target)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Builds the program plain and once per sanitizer, and the library to preload; returns the paths."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("AMX is of x86-64, and the emulator of Linux")
    folder = tmp_path_factory.mktemp("amx")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no {COMPILER[0]}")
    known = subprocess.run(
        [*COMPILER, "-x", "c++", "-c", "-", "-o", str(folder / "known.o")],
        input='void f() { asm("tdpbf16ps %tmm2, %tmm1, %tmm0"); }',
        capture_output=True,
        text=True,
    )
    if known.returncode != 0:
        pytest.skip("the assembler does not know AMX")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {
            build: [
                pool.submit(compile_file, name, folder / f"{build}-{name}.o", *flags, "-c")
                for name in ("amx_emulator_test", "amx_emulator")
            ]
            for build, flags in BUILDS.items()
        }
        preload = pool.submit(
            compile_file, "amx_emulator", folder / "libamx.so", "-shared", "-fPIC", "-DFASTRNN_PRELOAD", "-ldl"
        )
        for build, futures in objects.items():
            files = [future.result() for future in futures]
            subprocess.run([*COMPILER, *BUILDS[build], *files, "-o", str(folder / build)], check=True)
        preload.result()
    return {**{build: folder / build for build in BUILDS}, "preload": folder / "libamx.so"}


@pytest.mark.parametrize(
    ("build", "multiply", "rewrite"),
    [
        ("plain", "avx512", "1"),
        ("plain", "avx2", "1"),
        ("plain", "plain", "0"),
        ("address", "", "1"),
        ("address", "", "0"),
        ("thread", "", "1"),
        ("thread", "", "0"),
    ],
)
def test_program(programs, build, multiply, rewrite):
    environment = {**os.environ, "FASTRNN_AMX_MULTIPLY": multiply, "FASTRNN_AMX_REWRITE": rewrite}
    result = subprocess.run([programs[build]], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("ok")


def preloaded(programs, *arguments):
    environment = {**os.environ, "LD_PRELOAD": str(programs["preload"])}
    command = [sys.executable, "-X", "faulthandler", "-c", PRELOADED, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_preloaded_into_python(programs):
    result = preloaded(programs)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr[-3000:]


def test_a_handler_of_python_is_behind_the_emulator(programs):
    result = preloaded(programs, "handler")
    assert (result.returncode, result.stdout) == (0, "handled True\nok\n"), result.stderr[-3000:]


def test_other_illegal_instructions_end_python_as_ever(programs):
    result = preloaded(programs, "ill")
    assert result.returncode == -4 and "Fatal Python error: Illegal instruction" in result.stderr, result.stderr
