"""The torch-free kernels by themselves: accuracy of the activations, and a C++ driver under the sanitizers.

The driver (tests/csrc/driver.cpp) is compiled here, without optimisation: with every tier for AddressSanitizer and
UndefinedBehaviorSanitizer (the widest for AddressSanitizer alone: compiling it for both takes minutes), with the scalar
tier for ThreadSanitizer, since no tier has threading of its own. It checks gradients by differences, and that tiers
agree and threads change nothing, on buffers of exactly the right size.
"""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrnn import _C

CSRC = Path(__file__).parent.parent / "csrc"
X86 = platform.machine() in ("x86_64", "AMD64")
TIERS = {"scalar": []}
if X86:
    TIERS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    TIERS["avx512"] = TIERS["avx2"] + ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """Builds the driver once per sanitizer; returns the paths."""
    folder = tmp_path_factory.mktemp("driver")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O0", "-g1", "-pthread", "-w"]
    rest = [
        CSRC / "cpu" / "workspace.cpp",
        CSRC / "cpu" / "plan.cpp",
        CSRC / "cpu" / "dispatch.cpp",
        Path(__file__).parent / "csrc" / "driver.cpp",
    ]

    def compile_one(sanitizer, tiers, source):
        target = folder / f"{sanitizer}-{source.stem}.o"
        flags = SANITIZERS[sanitizer] + TIERS.get(source.stem, [])
        if source.stem in ("avx2", "avx512"):  # the same code as scalar's, but for vec.h; minutes of compiling
            flags.append("-fno-sanitize=undefined")
        if "avx2" in tiers:
            flags.append("-DFASTRNN_X86")
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    jobs = {"address": list(TIERS), "thread": ["scalar"]}
    paths = {sanitizer: folder / sanitizer for sanitizer in jobs}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {
            sanitizer: [
                pool.submit(compile_one, sanitizer, tiers, source)
                for source in [*(CSRC / "cpu" / f"{tier}.cpp" for tier in reversed(tiers)), *rest]  # the longest first
            ]
            for sanitizer, tiers in jobs.items()
        }
        for sanitizer, futures in objects.items():
            files = [future.result() for future in futures]
            subprocess.run([*compiler, *SANITIZERS[sanitizer], *files, "-o", str(paths[sanitizer])], check=True)
    return paths


@pytest.mark.parametrize(
    ("sanitizer", "arguments"),
    [
        ("address", ["layers", "50"]),
        ("address", ["gradient", "60"]),
        ("address", ["ulp", "40009"]),
        ("thread", ["layers", "12"]),
    ],
)
def test_driver(drivers, sanitizer, arguments):
    result = subprocess.run([drivers[sanitizer], *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("ok")


def exact(function, x):
    x = x.astype(np.longdouble if x.dtype == np.float64 else np.float64)
    if function == "tanh":
        return np.tanh(x)
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def samples(dtype):
    generator = np.random.default_rng(0)
    if dtype == np.float32:
        x = np.arange(0, 2**32, 499, dtype=np.uint64).astype(np.uint32).view(np.float32)
        return x[np.abs(x) < 110]
    size = np.exp2(generator.uniform(-30, 9.5, 2_000_000))
    return np.concatenate([size, -size, 3 * generator.standard_normal(2_000_000)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_activation_is_within_two_ulp(isa, function, dtype):
    x = samples(dtype)
    y = np.full_like(x, 7)
    _C.activation(function, str(x.dtype), x.ctypes.data, y.ctypes.data, x.size)
    want = exact(function, x)
    nearest = want.astype(dtype)
    normal = np.abs(nearest) >= np.finfo(dtype).tiny
    error = np.abs(y - want)[normal] / np.spacing(np.abs(nearest[normal]))
    assert error.max() <= 2
    # Results below the normal range: within two steps of the smallest number, or as close as 0.1%.
    small = np.abs(y - want)[~normal]
    assert np.all(small <= 2 * np.finfo(dtype).smallest_subnormal + 1e-3 * np.abs(want[~normal]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_at_special_values(isa, dtype):
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1000.0, -1000.0], dtype=dtype)
    for function in ("sigmoid", "tanh"):
        y = torch.full_like(x, 7)
        _C.activation(function, str(dtype).removeprefix("torch."), x.data_ptr(), y.data_ptr(), x.numel())
        torch.testing.assert_close(y, getattr(torch, function)(x), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(y[:2]), torch.signbit(getattr(torch, function)(x[:2])))
