"""The torch-free kernels by themselves: accuracy of the activations, and a C++ driver under the sanitizers.

The driver (tests/csrc/driver.cpp) is compiled here, without optimisation. It checks gradients by differences, that
tiers agree and that threads change nothing, on buffers of exactly the right size. With the scalar tier alone it is part
of the suite, under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer. The vector tiers are
the same code but for vec.h, and take minutes to compile (-m long); AMX's, whose instructions are emulated where the
machine has none, has products and a chain of its own (tiles.h, tiled_passes.h).
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
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
VECTORS = {"avx2": AVX2, "avx512": AVX512, "amx": AVX512}
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# Of vector tiers UndefinedBehaviorSanitizer sees nothing that it does not see of the scalar one, for twice the time.
DRIVERS = {name: (flags, {}) for name, flags in SANITIZERS.items()} | {
    "address, every tier": (["-fsanitize=address"], VECTORS),
    "thread, every tier": (["-fsanitize=thread"], VECTORS),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Builds the driver under a sanitizer, once; returns its path."""
    built = {}

    def build(name):
        if name not in built:
            built[name] = build_driver(tmp_path_factory.mktemp("driver"), *DRIVERS[name])
        return built[name]

    return build


def build_driver(folder, sanitizer, tiers):
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O0", "-g1", "-pthread", "-w", *sanitizer]
    sources = [CSRC / "cpu" / f"{tier}.cpp" for tier in ("amx", "avx512", "avx2") if tier in tiers]  # the longest first
    sources += [CSRC / "cpu" / f"{name}.cpp" for name in ("scalar", "workspace", "plan", "dispatch")]
    sources.append(Path(__file__).parent / "csrc" / "driver.cpp")
    if tiers:
        compiler.append("-DFASTRNN_X86")
        sources.append(Path(__file__).parent / "csrc" / "amx_emulator.cpp")

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        subprocess.run([*compiler, *tiers.get(source.stem, []), "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([*compiler, *objects, "-o", str(folder / "driver"), "-ldl"], check=True)
    return folder / "driver"


def run_driver(path, *arguments):
    result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("ok")


@pytest.mark.parametrize(
    ("sanitizer", "arguments"),
    [
        ("address", ["layers", "50"]),
        ("address", ["gradient", "60"]),
        ("address", ["ulp", "40009"]),
        ("thread", ["layers", "12"]),
    ],
)
def test_driver(driver, sanitizer, arguments):
    run_driver(driver(sanitizer), *arguments)


@pytest.mark.long
@pytest.mark.skipif(not X86, reason="the scalar tier is the only one")
@pytest.mark.parametrize(
    ("sanitizer", "arguments"),
    [
        ("address, every tier", ["layers", "50"]),
        ("address, every tier", ["gradient", "60"]),
        ("address, every tier", ["ulp", "40009"]),
        ("address, every tier", ["tiles", "60"]),
        ("thread, every tier", ["layers", "12"]),
        ("thread, every tier", ["tiles", "40"]),
    ],
)
def test_every_tier(driver, sanitizer, arguments):
    if arguments[0] == "tiles" and "avx512_bf16" not in _C.isas():
        pytest.skip("the tier has AVX-512's bfloat16 instructions beside AMX's, which this machine has not")
    run_driver(driver(sanitizer), *arguments)


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
