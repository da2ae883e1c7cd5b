"""The libraries as files: which instructions live where, what they need from outside, and how a tier is forced."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fastrnn._C as _C
import pytest
import torch
from conftest import DEFAULT_ISA, ISAS

import fastrnn

OPS = Path(fastrnn.__file__).with_name("_ops.so")
BINDINGS = Path(_C.__file__)


def tool(name, *arguments):
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif("avx2" not in _C.build_info()["isas"], reason="this build has no x86 kernels")
def test_no_wide_instruction_outside_its_tier():
    """One function that two translation units emit is kept once, from either: it would crash an older machine."""
    symbol, counts, leaks = "", {"avx2": 0, "avx512": 0}, []
    for line in tool("objdump", "-d", "--no-show-raw-insn", "--demangle", str(OPS)).splitlines():
        if line.endswith(">:"):
            symbol = line
            continue
        parts = line.split("\t")
        if len(parts) < 2:
            continue
        words = parts[1].split()
        zmm = "%zmm" in line or re.search(r"%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", line)
        vex = words[0].startswith("v") and re.search(r"%[xyz]mm", line)
        if zmm:
            counts["avx512"] += 1
            if not any(f"fastrnn::{tier}::" in symbol for tier in ("avx512", "amx")):
                leaks.append((symbol, line))
        elif vex:
            counts["avx2"] += 1
            if not any(f"fastrnn::{tier}::" in symbol for tier in ("avx2", "avx512", "amx")):
                leaks.append((symbol, line))
    assert not leaks, leaks[:5]
    assert counts["avx2"] > 1000, "no vector code was found at all: is the symbol table stripped?"
    assert "avx512" not in _C.build_info()["isas"] or counts["avx512"] > 1000


# The stable ABI and no other name of torch; omp_*: weak, asks whether a parallel region is around us; cublas*: weak,
# torch's own where it is built for CUDA; fastrnn_emulates_amx: weak, the tests' emulator; the tool chain's.
ALLOWED = re.compile(
    r"aoti_torch_\w+|torch_\w+|omp_\w+|cublas\w+|fastrnn_emulates_amx|_ITM_\w+|__gmon_start__|__cxa_finalize"
)
# What not every torch has.
WEAK = re.compile(
    r"fastrnn_emulates_amx|omp_\w+|cublas\w+|aoti_torch_get_current_cuda_stream"
    r"|torch_exception_get_what_without_backtrace"
)
SYSTEM = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")


def test_undefined_symbols_are_the_stable_abi_and_the_system():
    strange = []
    for line in tool("nm", "-D", "--undefined-only", str(OPS)).splitlines():
        kind, name = line.split()[-2:]
        name, _, version = name.partition("@")
        assert not WEAK.fullmatch(name) or kind in "wv", f"{name} must be weak: not every torch brings it"
        if not version.lstrip("@").startswith(SYSTEM) and not ALLOWED.fullmatch(name):
            strange.append(name)
    assert not strange, strange


def test_the_cuda_runtime_inside_stays_inside():
    """Linked statically: neither do we offer its names to others, nor could another copy of it answer for ours."""
    names = [line.split()[-1] for line in tool("nm", "-D", str(OPS)).splitlines()]
    assert not [name for name in names if re.match(r"_*cu(da|dart|[A-Z])", name)]
    assert "cublasGemmEx" in names or not _C.build_info()["cuda_architectures"]


def test_needed_libraries():
    """No library of CUDA among them: a torch with and one without load the same file."""
    base = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "librt.so.1",  # these three for the CUDA runtime, until glibc 2.34 took them in
        "libdl.so.2",
        "libpthread.so.0",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    }
    for library, own in ((OPS, {"libtorch.so", "libtorch_cpu.so"}), (BINDINGS, {"_ops.so"})):
        text = tool("readelf", "-d", str(library))
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", text))
        assert needed <= base | own
        assert needed & own
    assert "$ORIGIN" in text  # _C finds _ops beside itself, wherever the package is copied


def test_the_operators_load_without_python():
    """A C++ program loads _ops.so with no interpreter in it: nothing of Python is undefined."""
    names = tool("nm", "-D", "--undefined-only", str(OPS))
    assert not re.search(r"\bPy[A-Z_]|\b_Py", names)


def test_no_path_of_the_build_machine_is_inside():
    root = str(Path(fastrnn.__file__).resolve().parents[1])
    if "site-packages" in root:
        pytest.skip("fastrnn is installed, so the source folder is not known")
    for library in (OPS, BINDINGS):
        assert f"{root}/csrc".encode() not in library.read_bytes()


def isa_of_a_child(value):
    environment = dict(os.environ)
    environment.pop("FASTRNN_ISA", None)
    if value is not None:
        environment["FASTRNN_ISA"] = value
    code = "import torch, fastrnn; i = fastrnn.build_info(); fastrnn.GRU(3, 5)(torch.ones(2, 1, 3)); "
    code += "print(i['isa'], repr(i['rejected_environment']), sep='|')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().split("|")


@pytest.mark.parametrize("name", ISAS)
def test_the_environment_forces_a_tier(name):
    assert isa_of_a_child(name) == [name, "None"]


def test_an_unknown_tier_in_the_environment_is_reported_and_not_fatal():
    assert isa_of_a_child("mmx") == [DEFAULT_ISA, "'mmx'"]


def test_an_unknown_tier_is_warned_of_when_fastrnn_is_imported():
    environment = {**os.environ, "FASTRNN_ISA": "AVX2"}
    code = [sys.executable, "-c", "import fastrnn"]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
    assert f"FASTRNN_ISA: expected one of {', '.join(ISAS)} on this machine, got 'AVX2'" in done.stderr


def test_an_empty_environment_is_the_default():
    assert isa_of_a_child(None) == isa_of_a_child("") == [DEFAULT_ISA, "None"]


def test_set_isa():
    default = _C.isa()
    for name in ISAS:
        assert _C.set_isa(name) is None
        assert _C.isa() == name == fastrnn.build_info()["isa"]
    _C.set_isa("")
    assert _C.isa() == default
    for bad in ("mmx", "AVX2", " avx2", "scalar "):
        with pytest.raises(ValueError, match="expected") as caught:
            _C.set_isa(bad)
        assert bad.strip() in str(caught.value)
        assert "scalar" in str(caught.value)
        assert _C.isa() == default
    with pytest.raises(TypeError):
        _C.set_isa(3)


def test_tiers_compute_the_same_numbers_in_their_own_way():
    """Each tier is really used: close results, but not one kernel under three names."""
    rnn, x = fastrnn.LSTM(40, 67), torch.randn(20, 5, 40)
    found = []
    for name in ISAS:
        _C.set_isa(name)
        found.append(rnn(x)[0])
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-6 * found[0].norm()
    if len(ISAS) > 1:
        assert not found[0].equal(found[-1])


def test_importing_is_quiet_and_leaves_torch_as_it_was():
    code = (
        "import torch; a = (torch.get_num_threads(), torch.get_default_dtype(), torch.nn.LSTM.forward); "
        "import fastrnn; "
        "assert a == (torch.get_num_threads(), torch.get_default_dtype(), torch.nn.LSTM.forward)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
