"""The CUDA side as it is built, without a card: what setup.py makes of its environment, that every kernel compiles for
every default architecture and needs no more registers than there are, and csrc/cuda/runtime.cpp by itself.

What ptxas said of each kernel was kept by the build beside the objects; kernels are compiled here only where that build
was for other architectures, is out of date, or had no CUDA. ptxas itself holds the registers of a kernel to what its
launch bounds leave, by putting the rest into memory: so what to look at are spills and stack frames.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
VARIABLES = ("FASTRNN_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
NVCC = shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if os.environ.get("CUDA_HOME") else None)
CXX = shutil.which(os.environ.get("CXX", "g++"))
COMPILED = {"sm_80", "sm_90a"}  # of the default architectures; 9.0+PTX is text beside 9.0a

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: there is nothing that could be compiled")
Kernel = namedtuple("Kernel", "name arch stack stores loads registers")


def load_setup():
    spec = importlib.util.spec_from_file_location("fastrnn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    """setup.py's names, in an environment in which nothing is set and nvcc is on PATH, if anywhere."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", CXX)
    if NVCC:
        monkeypatch.setenv("PATH", str(Path(NVCC).parent), prepend=os.pathsep)
    return load_setup()


def rules(setup, folder):
    architectures = setup.write_ninja(folder, "0.0.0")
    return (folder / "build.ninja").read_text(), architectures


def run_ninja(setup, folder, *arguments):
    return subprocess.run([setup.find_ninja(), "-C", str(folder), *arguments], capture_output=True, text=True)


def read_report(log):
    """The kernels in what `ptxas -v` said."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n.*Function properties for (?P=name)\n"
        r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers"
    )
    text = log.read_text()
    kernels = [
        Kernel(*(int(value) if value.isdigit() else value for value in found.groups()))
        for found in entry.finditer(text)
    ]
    assert len(kernels) == text.count("Compiling entry function"), f"{log} is not understood"
    return kernels


# ------------------------------------------------------------------------------------------------ what setup.py is told


@needs_nvcc
def test_cuda_is_built_where_there_is_nvcc(setup, tmp_path):
    text, architectures = rules(setup, tmp_path)
    assert architectures == ["8.0", "9.0a", "9.0+PTX"]
    assert re.findall(r"-gencode=[^']*", text) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_90,code=[compute_90]",
    ]
    for source in SOURCES:
        assert f"build cuda/{source.name}.o | cuda/{source.name}.o.log: nvcc" in text
    linked = re.search(r"build _ops.so: link (.*)", text)[1].split()
    for source in [*SOURCES, *(ROOT / "csrc/cuda").glob("*.cpp")]:
        built = re.search(rf"build (\S+\.o)( \| \S+)?: (cxx|nvcc) \S*csrc/cuda/{re.escape(source.name)}\n", text)
        assert built and built[1] in linked, source
    told = re.findall(r"build (\S+)\.o: cxx .*\n  flags = .*-DFASTRNN_CUDA\b", text)
    assert sorted(told) == sorted(
        ["ops", "module", *(f"cuda/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cpp"))]
    )
    assert "-lcudart_static" in text and "-lcublas" not in text


@pytest.mark.parametrize("value", ["0", "auto", "", None])
def test_no_cuda_without_nvcc_or_on_request(setup, tmp_path, monkeypatch, value):
    if value != "0":
        monkeypatch.setenv("PATH", str(tmp_path))
    if value is not None:
        monkeypatch.setenv("FASTRNN_CUDA", value)
    text, architectures = rules(setup, tmp_path)
    assert architectures == []
    assert "nvcc" not in text and "FASTRNN_CUDA" not in text and "cudart" not in text
    # The switch and the plan are asked for all the same.
    assert re.findall(r"build cuda/(\S+)\.o:", text) == ["force.cpp", "plan.cpp"]
    assert "build _ops.so: link ops.o " in text


def test_nvcc_is_missed_on_request(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRNN_CUDA", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"FASTRNN_CUDA=1 wants CUDA kernels, but there is no nvcc on PATH"):
        setup.write_ninja(tmp_path, "0.0.0")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match=r"no nvcc in CUDA_HOME, /nowhere/bin"):
        setup.write_ninja(tmp_path, "0.0.0")
    assert not (tmp_path / "build.ninja").exists()


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", " 1"])
def test_another_wish_is_refused(setup, tmp_path, monkeypatch, value):
    monkeypatch.setenv("FASTRNN_CUDA", value)
    with pytest.raises(SystemExit, match=f"FASTRNN_CUDA: expected auto, 0 or 1, got '{value}'"):
        setup.write_ninja(tmp_path, "0.0.0")


@needs_nvcc
@pytest.mark.parametrize("value", ["sm_90", "90", "Hopper", "9.0;8", "9.0+ptx", "99.0", "7.5", "7.0;7.5+PTX"])
def test_another_architecture_is_refused(setup, tmp_path, monkeypatch, value):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: ") as caught:
        setup.write_ninja(tmp_path, "0.0.0")
    assert value.split(";")[-1] in str(caught.value)


@needs_nvcc
@pytest.mark.parametrize(
    ("value", "names", "codes"),
    [
        ("9.0", ["9.0"], ["compute_90,code=[sm_90]"]),
        ("9.0+PTX", ["9.0+PTX"], ["compute_90,code=[sm_90,compute_90]"]),
        (" 8.0 8.6;9.0a; ", ["8.0", "8.6", "9.0a"], ["compute_80", "compute_86", "compute_90a,code=[sm_90a]"]),
        ("9.0a+PTX;9.0", ["9.0a+PTX", "9.0"], ["compute_90a,code=[sm_90a,compute_90a]"]),
        ("7.5;8.0;8.0", ["8.0"], ["compute_80,code=[sm_80]"]),
    ],
)
def test_architectures_are_chosen_as_everywhere(setup, tmp_path, monkeypatch, capsys, value, names, codes):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    text, architectures = rules(setup, tmp_path)
    assert architectures == names
    found = re.findall(r"-gencode=arch=([^']*)", text)
    assert len(found) == len(codes)
    assert all(one.startswith(start) for one, start in zip(found, codes))
    assert f'FASTRNN_CUDA_ARCHITECTURES=\\"{",".join(names)}\\"' in text
    assert ("7.5 is left out" in capsys.readouterr().out) == ("7.5" in value)


@needs_nvcc
def test_the_toolkit_is_found_behind_a_script(setup, tmp_path, monkeypatch):
    direct, _ = rules(setup, tmp_path)
    script = tmp_path / "home/bin/nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec {NVCC} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    behind, _ = rules(setup, tmp_path)
    assert f"nvcc = {script}" in behind
    assert behind.replace(f"nvcc = {script}", f"nvcc = {shutil.which('nvcc')}") == direct
    assert (Path(re.search(r"'-L(.*?)' -lcudart_static", direct)[1]) / "libcudart_static.a").exists()


# ------------------------------------------------------------------------------------------------------- what nvcc does

GOOD = """
#include "size.h"
__global__ void __launch_bounds__(256) plain(float* x) { x[threadIdx.x] *= size; }
__global__ void __launch_bounds__(1024) greedy(const float* x, float* y, int n) {
  float kept[160];
  #pragma unroll
  for (int i = 0; i < 160; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  for (int j = 0; j < n; ++j) {
    #pragma unroll
    for (int i = 0; i < 160; ++i) kept[i] = kept[i] * kept[(i + 1) % 160] + kept[(i + 77) % 160];
  }
  #pragma unroll
  for (int i = 0; i < 160; ++i) y[i * 1024 + threadIdx.x] = kept[i];
}
int unused_on_the_host() { int forgotten; return 0; }
"""


@needs_nvcc
def test_the_rule_for_cuda_files(setup, tmp_path, monkeypatch):
    """Reports are kept and right, warnings shown, errors fatal, and a changed header compiles again."""
    folder = tmp_path / "build"
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    folder.mkdir()
    (tmp_path / "csrc/cuda/good.cu").write_text(GOOD)
    (tmp_path / "csrc/cuda/bad.cu").write_text("__global__ void broken(float* x) { x = 1; }\n")
    (tmp_path / "csrc/cuda/size.h").write_text("#define size 3\n")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    setup.write_ninja(folder, "0.0.0")

    done = run_ninja(setup, folder, "cuda/good.cu.o")
    assert done.returncode == 0, done.stdout
    assert "forgotten" in done.stdout and "ptxas info" not in done.stdout and "spill" not in done.stdout
    kernels = read_report(folder / "cuda/good.cu.o.log")
    assert {(kernel.name, kernel.arch) for kernel in kernels} == {
        (name, arch) for name in ("_Z5plainPf", "_Z6greedyPKfPfi") for arch in COMPILED
    }
    for kernel in kernels:
        greedy = "greedy" in kernel.name
        assert (kernel.stores > 0) == (kernel.loads > 0) == (kernel.stack > 0) == greedy, kernel
        assert 0 < kernel.registers <= 64
    assert str(tmp_path).encode() not in (folder / "cuda/good.cu.o").read_bytes()

    assert "no work to do" in run_ninja(setup, folder, "-n", "cuda/good.cu.o").stdout
    (folder / "cuda/good.cu.o.log").unlink()
    assert "compile" in run_ninja(setup, folder, "-n", "cuda/good.cu.o").stdout
    run_ninja(setup, folder, "cuda/good.cu.o")
    (tmp_path / "csrc/cuda/size.h").write_text("#define size 4\n")
    assert "compile" in run_ninja(setup, folder, "-n", "cuda/good.cu.o").stdout

    done = run_ninja(setup, folder, "cuda/bad.cu.o")
    assert done.returncode != 0 and "bad.cu(1): error" in done.stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{file name: its kernels}, from the build, or compiled here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("PATH", str(Path(NVCC).parent), prepend=os.pathsep)
        setup = load_setup()
        objects = [f"cuda/{source.name}.o" for source in SOURCES]

        def read(folder):
            return {source.name: read_report(folder / f"cuda/{source.name}.o.log") for source in SOURCES}

        built = setup.build_folder()
        if (built / "build.ninja").exists() and "no work to do" in run_ninja(setup, built, "-n", *objects).stdout:
            found = read(built)
            if all({kernel.arch for kernel in kernels} == COMPILED for kernels in found.values()):
                return found
        folder = tmp_path_factory.mktemp("cuda")
        setup.write_ninja(folder, "0.0.0")
        done = run_ninja(setup, folder, *objects)
        assert done.returncode == 0, done.stdout
        return read(folder)


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_file_compiles_for_every_architecture(reports, source):
    names = {arch: {kernel.name for kernel in reports[source.name] if kernel.arch == arch} for arch in COMPILED}
    assert {kernel.arch for kernel in reports[source.name]} == COMPILED
    assert names["sm_80"] == names["sm_90a"]


@needs_nvcc
@pytest.mark.skipif(
    not (ROOT / "csrc/cuda/resident.cuh").exists(), reason="no kernel keeps its weights on the chip yet"
)
def test_weights_that_stay_in_registers_do(reports):
    """What is spilled is read again at every step: then the kernel is not what its plan takes it for."""
    resident = [kernel for kernels in reports.values() for kernel in kernels if "resident" in kernel.name]
    assert resident
    assert not [kernel for kernel in resident if kernel.stack or kernel.stores or kernel.loads]
    assert max(kernel.registers for kernel in resident) <= 255


# ------------------------------------------------------------------------------------------------ runtime.cpp by itself


def compile_runtime(setup, folder, source, *rest):
    cuda = setup.Cuda(NVCC, CXX)
    command = [CXX, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread", "-isystem", cuda.include]
    files = [source, ROOT / "csrc/cuda/runtime.cpp"]
    subprocess.run([*command, *files, *(word.format(lib=cuda.lib) for word in rest), "-o", folder / "main"], check=True)
    environment = {**os.environ, "LSAN_OPTIONS": "exitcode=0"}  # handles and facts are kept to the end
    return subprocess.run([folder / "main"], env=environment, capture_output=True, text=True)


@needs_nvcc
def test_what_is_asked_of_cuda(setup, tmp_path):
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = compile_runtime(setup, tmp_path, ROOT / "tests/csrc/cuda_runtime.cpp", *sanitizers)
    assert done.returncode == 0, done.stderr
    assert "1167 products, 11 launches" in done.stdout


NO_CARD = """
#include <cstdio>
#include <stdexcept>
#include "{root}/csrc/cuda/runtime.h"
using namespace fastrnn::cuda;
void kernel(int) {{}}
template <class Action> void tell(Action action) {{
  try {{ action(), puts("nothing"); }} catch (const std::runtime_error& error) {{ puts(error.what()); }}
}}
int main() {{
  float x = 0;
  printf("%d %d %d\\n", card().arch, card().processors, card().shared_bytes);
  printf("%d\\n", resident(reinterpret_cast<const void*>(kernel), LaunchShape()));
  tell([&] {{ set_zero(&x, 4, nullptr); }});
  tell([&] {{ launch(kernel, LaunchShape(), nullptr, 1); }});
  const Matrix one{{&x, fastrnn::Dtype::f32, 1}};
  tell([&] {{ multiply({{1, 1, 1, one, one, &x, fastrnn::Dtype::f32, 1}}, nullptr, nullptr); }});
}}
"""


@needs_nvcc
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a card in this machine")
def test_without_a_card_and_without_cublas(setup, tmp_path):
    """By the real CUDA runtime, as it is linked into _ops.so."""
    source = tmp_path / "main.cpp"
    source.write_text(NO_CARD.format(root=ROOT))
    libraries = ["-L{lib}", "-lcudart_static", "-lrt", "-ldl"]
    done = compile_runtime(setup, tmp_path, source, *libraries)
    assert done.returncode == 0, done.stderr
    card, count, zero, launched, product = done.stdout.splitlines()
    assert (card, count) == ("0 0 0", "0")
    assert re.fullmatch(r"fastrnn: setting 4 bytes of memory to zero: .+ \(cudaError\w+\)", zero)
    assert re.fullmatch(r"fastrnn: .+: .+ \(cudaError\w+\)", launched)
    assert product == "fastrnn: cuBLAS is not in this process: expected the one that a torch built for CUDA loads"


# ---------------------------------------------------------------------------------------------------------- the package


def test_an_sdist_holds_the_cuda_sources(tmp_path):
    """Files that build_ext does not name one by one: MANIFEST.in does."""
    for part in ("csrc", "tests", "fastrnn", ".ci"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for part in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"):
        shutil.copy(ROOT / part, tmp_path)
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "sdist", "--formats", "tar"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    listed = subprocess.run(
        ["tar", "tf", *(tmp_path / "dist").glob("*.tar")], capture_output=True, text=True, check=True
    )
    names = {name.partition("/")[2] for name in listed.stdout.splitlines()}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert files <= names
    assert "tests/conftest.py" in names
