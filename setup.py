"""Builds the two native libraries of fastrnn with ninja; everything else about the package is in pyproject.toml.

`_ops.so` holds the torch operators, one kernel library per instruction set and, where there is nvcc, the CUDA kernels;
`_C` is the pybind11 introspection module linked against it. Objects live in build/<python>-torch<version>/ and ninja
rebuilds what changed, headers included, for `pip install .`, an editable install and `python setup.py build_ext
--inplace` alike. Beside each CUDA object lies what ptxas says of its kernels, NAME.cu.o.log.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, and
    FASTRNN_CUDA          auto (CUDA where nvcc is found), 0 (without) or 1 (not without)
    CUDA_HOME             the toolkit whose bin/nvcc is used; else the nvcc on PATH
    TORCH_CUDA_ARCH_LIST  as for torch's own extensions; 8.0 and newer
    NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS  which nvcc reads by itself
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
MACOS = sys.platform == "darwin"

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
# One kernel library per instruction set, narrowest first: name -> its own flags. NEON gets a line here. The
# order is also the link order: should an inline function of a library header be emitted by several of them, the linker
# keeps the first, so no wide instruction leaks out.
ISAS = {"scalar": ""}
if X86:
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "amx": AVX512}
# What these libraries hold under names of their own: avx512's has a second table of kernels (csrc/cpu/operand.h).
TIERS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"] if X86 else ["scalar"]

CUDA_ARCHITECTURES = "8.0;9.0a;9.0+PTX"

FLAGS = (
    "-std=c++17 -O3 -g0 -DNDEBUG -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra"
    # The oldest torch that the operators run under; the headers refuse anything younger.
    " -DTORCH_TARGET_VERSION=0x020b000000000000" + (" -DFASTRNN_X86" if X86 else "")
)


def fail(message):
    sys.stdout.flush()
    raise SystemExit(f"error: fastrnn: {message}")


def build_folder():
    import torch

    return ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}-{platform.machine()}"


def find_ninja():
    try:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        path = None
    return path or shutil.which("ninja") or fail("ninja is missing: pip install ninja")


def find_nvcc():
    """The path of nvcc, or None where there is to be no CUDA."""
    wanted = os.environ.get("FASTRNN_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        fail(f"FASTRNN_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not nvcc and wanted == "1":
        place = f"in CUDA_HOME, {home}/bin" if home else "on PATH (or set CUDA_HOME)"
        fail(f"FASTRNN_CUDA=1 wants CUDA kernels, but there is no nvcc {place}")
    return nvcc


def ask(command):
    """What a program says, on whichever channel."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        fail(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout


class Cuda:
    """A toolkit and the architectures to compile for."""

    def __init__(self, nvcc, host_compiler):
        self.nvcc, self.host_compiler = nvcc, host_compiler
        # nvcc may be a script that calls another one: only what it would run tells where the toolkit is.
        said = ask([nvcc, "--dryrun", "-ccbin", host_compiler, "-x", "cu", "-c", os.devnull])
        top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE) or fail(f"{nvcc} --dryrun names no TOP of a toolkit")
        self.top = Path(top[1].strip()).resolve()
        targets = f"targets/{platform.machine().replace('aarch64', 'sbsa')}-linux"
        self.include = self.find("cuda_runtime_api.h", "include", f"{targets}/include")
        self.lib = self.find("libcudart_static.a", "lib64", "lib", f"{targets}/lib")
        self.architectures, self.codes = self.read_architectures()

    def find(self, file, *folders):
        for folder in folders:
            if (self.top / folder / file).exists():
                return self.top / folder
        fail(f"{self.nvcc} belongs to a toolkit without {file} (in {self.top}; FASTRNN_CUDA=0 builds without CUDA)")

    def read_architectures(self):
        """The names in TORCH_CUDA_ARCH_LIST that there are kernels for, and nvcc's words for them."""
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;") or CUDA_ARCHITECTURES
        known = set(re.findall(r"compute_(\d+)\b", ask([self.nvcc, "--list-gpu-arch"])))
        names, codes = list(dict.fromkeys(re.split(r"[;,\s]+", listed))), []
        for name in list(names):
            parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
            if not parts:
                fail(f"TORCH_CUDA_ARCH_LIST: expected names like 8.0, 9.0a or 9.0+PTX, with ; between, got {name!r}")
            number, arch = parts[1] + parts[2], parts[1] + parts[2] + parts[3]
            if int(number) < 80:
                print(f"fastrnn: TORCH_CUDA_ARCH_LIST: {name} is left out, the kernels need 8.0 or newer", flush=True)
                names.remove(name)
                continue
            if number not in known:
                fail(f"TORCH_CUDA_ARCH_LIST: {self.nvcc} does not know {name!r}")
            # What is compiled for 9.0a runs on every 9.0, so beside it 9.0 stands for its PTX alone.
            covered = f"{parts[1]}.{parts[2]}a" in [other.removesuffix("+PTX") for other in names] and not parts[3]
            code = [*([] if covered else [f"sm_{arch}"]), *([f"compute_{arch}"] if parts[4] else [])]
            if code:
                codes.append(f"'-gencode=arch=compute_{arch},code=[{','.join(code)}]'")
        if not codes:
            fail(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or newer among its architectures, got {listed!r}")
        return names, codes

    def ninja(self, prefixes):
        """The rule for .cu files. What ptxas reports of each kernel is kept; what is left of nvcc's words is shown."""
        flags = f"{FLAGS} -Wno-unknown-pragmas -forward-unknown-to-host-compiler -Xptxas -v {' '.join(self.codes)}"
        return (
            f"nvcc = {self.nvcc}\ncudaflags = -ccbin {self.host_compiler} {flags} {prefixes}\n\nrule nvcc\n"
            "  command = $nvcc --threads $${FASTRNN_NVCC_THREADS:-1} -MMD -MF $out.d $cudaflags -c $in -o $out"
            " >$out.log 2>&1; status=$$?; grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' $out.log;"
            " exit $$status\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in\n"
        )

    @property
    def libs(self):
        # The runtime's names stay inside: torch may have brought another copy of it, which must not answer for ours.
        runtime = f"'-L{self.lib}' -lcudart_static -Wl,--exclude-libs,libcudart_static.a"
        return f"{runtime} -Wl,--as-needed -lrt -ldl -lpthread "


def host_compiler_of(cxx):
    """The compiler itself in a CXX that may start with ccache and end with flags."""
    return next(word for word in shlex.split(cxx) if Path(word).name not in ("ccache", "sccache", "distcc", "icecc"))


def write_ninja(folder, version):
    """Writes build.ninja into `folder` (where ninja runs; file names in it are relative to that folder).

    Returns the CUDA architectures in it.
    """
    import pybind11
    import torch

    torch_dir = Path(torch.__file__).parent
    cxx = os.environ.get("CXX") or ("c++" if MACOS else "g++")
    if not shutil.which(shlex.split(cxx)[0]):
        fail(f"no C++ compiler: {cxx!r} is not on PATH; install g++ (Debian, Ubuntu: apt install g++) or set CXX")

    headers = {"torch": f"{torch_dir}/include", "pybind11": pybind11.get_include(), "py": sysconfig.get_path("include")}
    # Errors and asserts carry __FILE__: keep this machine's folders out of them.
    prefixes = " ".join(f"'-ffile-prefix-map={path}={name}'" for name, path in {**headers, ".": ROOT}.items())
    nvcc = find_nvcc()
    cuda = Cuda(nvcc, host_compiler_of(cxx)) if nvcc else None
    # Object -> its source and flags.
    objects = {
        "ops": ("csrc/ops.cpp", f"-isystem '{headers['torch']}'"),
        "threads": ("csrc/threads.cpp", f"-isystem '{headers['torch']}'"),
        "dispatch": ("csrc/cpu/dispatch.cpp", ""),
        "workspace": ("csrc/cpu/workspace.cpp", ""),
        "plan": ("csrc/cpu/plan.cpp", ""),
    }
    # gcc 12 takes the vectors in its own headers and in the register tiles for uninitialised.
    quiet = "-Wno-uninitialized -Wno-maybe-uninitialized"
    objects |= {isa: (f"csrc/cpu/{isa}.cpp", f"{flags} {quiet}") for isa, flags in ISAS.items()}
    kernels = []  # .cu files
    host = [ROOT / "csrc/cuda" / name for name in ("force.cpp", "plan.cpp")]  # which explain() asks without CUDA too
    flags = ""
    if cuda:
        flags = f"-DFASTRNN_CUDA -isystem '{cuda.include}'"
        objects["ops"] = (objects["ops"][0], f"{objects['ops'][1]} -DFASTRNN_CUDA")
        host = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
        kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    objects |= {f"cuda/{path.name}": (path, flags) for path in host}
    module_flags = [
        f"-isystem '{headers['pybind11']}' -isystem '{headers['py']}'",
        f'-DFASTRNN_VERSION=\\"{version}\\" -DFASTRNN_TORCH=\\"{torch.__version__}\\"',
        f'-DFASTRNN_ISAS=\\"{",".join(TIERS)}\\"',
        *([f'-DFASTRNN_CUDA -DFASTRNN_CUDA_ARCHITECTURES=\\"{",".join(cuda.architectures)}\\"'] if cuda else []),
    ]

    # torch is loaded before us, so no library path is recorded. libtorch itself is needed only for what it brings into
    # scope: in a CUDA build the stream symbol, which the operators look up weakly.
    if MACOS:
        library, module = "-dynamiclib -install_name @rpath/_ops.so", "-bundle -undefined dynamic_lookup"
        torch_libs, here = "-ltorch_cpu", "-Wl,-rpath,@loader_path"
    else:
        library, module = "-shared -Wl,-z,defs", "-shared"
        torch_libs, here = "-Wl,--no-as-needed -ltorch_cpu -ltorch", "-Wl,--enable-new-dtags,-rpath,$$ORIGIN"

    def relative(source):
        return os.path.relpath(ROOT / source, folder)

    def compile_rule(name, source, flags):
        return f"build {name}.o: cxx {relative(source)}\n  flags = {flags}\n"

    linked = [*objects, *(f"cuda/{path.name}" for path in kernels)]
    text = "\n".join(
        [
            f"cxx = {cxx}\ncxxflags = {FLAGS} {prefixes}\nuser = {os.environ.get('CXXFLAGS', '')}\n",
            "rule cxx\n  command = $cxx -MMD -MF $out.d $cxxflags $flags $user -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in\n",
            f"rule link\n  command = $cxx $flags $in $libs {os.environ.get('LDFLAGS', '')} -o $out",
            "  description = link $out\n",
            *([cuda.ninja(prefixes)] if cuda else []),
            # Ninja starts what comes first: the widest instruction set takes the longest, the rest fills the gaps.
            *(compile_rule(isa, *objects.pop(isa)) for isa in reversed(ISAS)),
            *(f"build cuda/{path.name}.o | cuda/{path.name}.o.log: nvcc {relative(path)}\n" for path in kernels),
            *(compile_rule(name, source, flags) for name, (source, flags) in objects.items()),
            compile_rule("module", "csrc/module.cpp", " ".join(module_flags)),
            compile_rule("direct", "csrc/direct.cpp", f"-isystem '{headers['py']}'"),
            f"build _ops.so: link {' '.join(f'{name}.o' for name in linked)}",
            f"  flags = {library}\n  libs = {cuda.libs if cuda else ''}'-L{torch_dir}/lib' {torch_libs}\n",
            # The module finds its neighbour wherever the package lies.
            f"build _C.so: link module.o direct.o _ops.so\n  flags = {module}\n  libs = '{here}'\n",
        ]
    )
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return cuda.architectures if cuda else []


class NinjaBuild(build_ext):
    """Runs ninja once for both libraries and hands the results to setuptools (wheel, in place or editable)."""

    def get_ext_filename(self, fullname):
        if fullname.split(".")[-1] == "_ops":  # depends on no Python version, so it carries none in its name
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        if sys.platform == "win32":
            fail("the native build supports Linux and macOS")
        import torch

        if torch.__version__ < (2, 11):  # TorchVersion compares with tuples
            fail(f"torch 2.11 or newer is needed, found {torch.__version__}")
        folder = build_folder()
        folder.mkdir(parents=True, exist_ok=True)
        architectures = write_ninja(folder, self.distribution.get_version())
        print(
            f"fastrnn: CUDA kernels for {', '.join(architectures) or 'nothing: no nvcc, or FASTRNN_CUDA=0'}", flush=True
        )
        jobs = os.environ.get("MAX_JOBS")
        command = [find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        # With more processors than CUDA files the architectures of a file are compiled side by side. Not by a flag in
        # build.ninja: everything would be compiled again by another number.
        files = len(list((ROOT / "csrc/cuda").glob("*.cu"))) or 1
        threads = str(max(1, int(jobs or os.cpu_count() or 1) // files))
        if subprocess.call(command, env={**os.environ, "FASTRNN_NVCC_THREADS": threads}):
            fail(
                "the C++ build failed; the compiler's messages are above"
                + (" (FASTRNN_CUDA=0 builds without CUDA)" if architectures else "")
            )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / f"{extension.name.split('.')[-1]}.so"), str(target))


if __name__ == "__main__":  # the tests import what is above
    setup(
        # The sources are named for setuptools; ninja knows the rest, and MANIFEST.in what an sdist holds.
        ext_modules=[Extension("fastrnn._ops", ["csrc/ops.cpp"]), Extension("fastrnn._C", ["csrc/module.cpp"])],
        cmdclass={"build_ext": NinjaBuild},
    )
