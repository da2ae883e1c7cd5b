"""fastrnn on CUDA tensors without a card: a copy of the package whose CUDA kernels run by the emulator (tests/csrc/
emulator.h), and a process that has a CUDA device made of host memory (tests/csrc/host_device.cpp) to run tests in.

What is compiled is what a CUDA build compiles, by g++ instead of nvcc; the CPU's kernels are the scalar ones.
"""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

import fastrnn

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
TORCH = Path(torch.__file__).parent
HOST = ["ops.cpp", "cpu/dispatch.cpp", "cpu/workspace.cpp", "cpu/plan.cpp", "cpu/scalar.cpp"]
EMULATED = {"cuda/runtime.cpp"}  # whose functions the emulator has

# Before torch, which looks for CUDA once. torch.cuda would ask for a driver.
START = """
import ctypes, sys
ctypes.CDLL({device!r}, ctypes.RTLD_GLOBAL)
import torch
torch.cuda._lazy_init = lambda: None
import pytest
sys.exit(pytest.main({arguments!r}))
"""


def build(folder: Path) -> Path:
    """Compiles all of it into `folder`; returns the folder that the package is in."""
    compiler = [os.environ.get("CXX", "g++"), "-g0", "-w", "-fPIC", "-isystem", str(TORCH / "include")]
    ours = [*compiler, "-std=c++17", "-fvisibility=hidden", "-DFASTRNN_CUDA"]
    ours.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", '-DFASTRNN_ISAS="scalar"']
    python += ['-DFASTRNN_VERSION=""', '-DFASTRNN_TORCH=""', '-DFASTRNN_CUDA_ARCHITECTURES="emulated"']
    cuda = [path.relative_to(CSRC).as_posix() for kind in ("*.cu", "*.cpp") for path in (CSRC / "cuda").glob(kind)]
    sources = [CSRC / name for name in [*HOST, *sorted(set(cuda) - EMULATED)]] + [TESTS / "csrc" / "emulator.cpp"]
    package = folder / "fastrnn"
    package.mkdir()

    def compile_one(source, *flags):
        target = folder / f"{source.parent.name}-{source.name}.o"
        flags += ("-O1" if source.parent.name == "cuda" or source.stem == "emulator" else "-O0",)  # where the time goes
        subprocess.run([*ours, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    def link(command, target, *rest):
        subprocess.run([*command, "-shared", "-o", str(target), *rest], check=True)

    torch_libs = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The newest dialect: torch's own headers, unlike the stable ones.
        device = [*compiler, "-std=c++20", str(TESTS / "csrc" / "host_device.cpp")]
        device += ["-isystem", str(TORCH / "include/torch/csrc/api/include")]
        device = pool.submit(link, device, folder / "device.so", *torch_libs, f"-Wl,-rpath,{TORCH / 'lib'}")
        module = pool.submit(compile_one, CSRC / "module.cpp", *python)
        objects = list(pool.map(compile_one, sources))
        link(compiler, package / "_ops.so", *objects, *torch_libs, "-lpthread")
        bindings = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        link(compiler, bindings, module.result(), str(package / "_ops.so"), "-Wl,--enable-new-dtags,-rpath,$ORIGIN")
        device.result()
    for path in Path(fastrnn.__file__).parent.glob("*.py"):
        (package / path.name).symlink_to(path)
    return folder


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest with these arguments, in a process of its own, on what `build` built."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "FASTRNN_ISA": "", "FASTRNN_GPU_PATH": "step"}
    # No file of the source's folder beside it: "" is where Python looks first.
    code = START.format(device=str(folder / "device.so"), arguments=["-p", "no:cacheprovider", "-q", *arguments])
    return subprocess.run([sys.executable, "-c", code], cwd=TESTS, env=environment, capture_output=True, text=True)
