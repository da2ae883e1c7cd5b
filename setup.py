"""Builds the two native libraries of fastrnn with ninja; everything else about the package is in pyproject.toml.

`_ops.so` holds the torch operators and one kernel library per instruction set, `_C` the pybind11 introspection module
linked against it. Objects live in build/<python>-torch<version>/ and ninja rebuilds what changed, headers included, for
`pip install .`, an editable install and `python setup.py build_ext --inplace` alike.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS.
"""

import os
import platform
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
# One kernel library per instruction set, narrowest first: name -> its own flags. AMX and NEON get a line here; CUDA
# sources get a rule of their own in write_ninja. The order is also the link order: should an inline function of a
# library header be emitted by several of them, the linker keeps the first, so no wide instruction leaks out.
ISAS = {"scalar": ""}
if X86:
    ISAS |= {"avx2": AVX2, "avx512": AVX512}
# What these libraries hold under names of their own: avx512's has a second table of kernels (csrc/cpu/operand.h).
TIERS = [*ISAS, *(["avx512_bf16"] if X86 else [])]

FLAGS = (
    "-std=c++17 -O3 -g0 -DNDEBUG -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra"
    # The oldest torch that the operators run under; the headers refuse anything younger.
    " -DTORCH_TARGET_VERSION=0x020b000000000000" + (" -DFASTRNN_X86" if X86 else "")
)


def fail(message):
    sys.stdout.flush()
    raise SystemExit(f"error: fastrnn: {message}")


def find_ninja():
    try:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        path = None
    return path or shutil.which("ninja") or fail("ninja is missing: pip install ninja")


def write_ninja(folder, version):
    """Writes build.ninja into `folder` (where ninja runs; file names in it are relative to that folder)."""
    import pybind11
    import torch

    torch_dir = Path(torch.__file__).parent
    cxx = os.environ.get("CXX") or ("c++" if MACOS else "g++")
    if not shutil.which(shlex.split(cxx)[0]):
        fail(f"no C++ compiler: {cxx!r} is not on PATH; install g++ (Debian, Ubuntu: apt install g++) or set CXX")

    headers = {"torch": f"{torch_dir}/include", "pybind11": pybind11.get_include(), "py": sysconfig.get_path("include")}
    # Errors and asserts carry __FILE__: keep this machine's folders out of them.
    prefixes = " ".join(f"'-ffile-prefix-map={path}={name}'" for name, path in {**headers, ".": ROOT}.items())
    # Object -> its source and flags.
    objects = {
        "ops": ("csrc/ops.cpp", f"-isystem '{headers['torch']}'"),
        "dispatch": ("csrc/cpu/dispatch.cpp", ""),
        "workspace": ("csrc/cpu/workspace.cpp", ""),
        "plan": ("csrc/cpu/plan.cpp", ""),
    }
    # gcc 12 takes the vectors in its own headers and in the register tiles for uninitialised.
    quiet = "-Wno-uninitialized -Wno-maybe-uninitialized"
    objects |= {isa: (f"csrc/cpu/{isa}.cpp", f"{flags} {quiet}") for isa, flags in ISAS.items()}
    module_flags = [
        f"-isystem '{headers['pybind11']}' -isystem '{headers['py']}'",
        f'-DFASTRNN_VERSION=\\"{version}\\" -DFASTRNN_TORCH=\\"{torch.__version__}\\"',
        f'-DFASTRNN_ISAS=\\"{",".join(TIERS)}\\"',
    ]

    # torch is loaded before us, so no library path is recorded. libtorch itself is needed only for what it brings into
    # scope: in a CUDA build the stream symbol, which the operators look up weakly.
    if MACOS:
        library, module = "-dynamiclib -install_name @rpath/_ops.so", "-bundle -undefined dynamic_lookup"
        torch_libs, here = "-ltorch_cpu", "-Wl,-rpath,@loader_path"
    else:
        library, module = "-shared -Wl,-z,defs", "-shared"
        torch_libs, here = "-Wl,--no-as-needed -ltorch_cpu -ltorch", "-Wl,--enable-new-dtags,-rpath,$$ORIGIN"

    def compile_rule(name, source, flags):
        return f"build {name}.o: cxx {os.path.relpath(ROOT / source, folder)}\n  flags = {flags}\n"

    text = "\n".join(
        [
            f"cxx = {cxx}\ncxxflags = {FLAGS} {prefixes}\nuser = {os.environ.get('CXXFLAGS', '')}\n",
            "rule cxx\n  command = $cxx -MMD -MF $out.d $cxxflags $flags $user -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in\n",
            f"rule link\n  command = $cxx $flags $in $libs {os.environ.get('LDFLAGS', '')} -o $out",
            "  description = link $out\n",
            *(compile_rule(name, source, flags) for name, (source, flags) in objects.items()),
            compile_rule("module", "csrc/module.cpp", " ".join(module_flags)),
            f"build _ops.so: link {' '.join(f'{name}.o' for name in objects)}",
            f"  flags = {library}\n  libs = '-L{torch_dir}/lib' {torch_libs}\n",
            # The module finds its neighbour wherever the package lies.
            f"build _C.so: link module.o _ops.so\n  flags = {module}\n  libs = '{here}'\n",
        ]
    )
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


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
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}-{platform.machine()}"
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja(folder, self.distribution.get_version())
        jobs = os.environ.get("MAX_JOBS")
        command = [find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        if subprocess.call(command):
            fail("the C++ build failed; the compiler's messages are above")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / f"{extension.name.split('.')[-1]}.so"), str(target))


setup(
    # The sources are named for the sdist; ninja knows the rest.
    ext_modules=[Extension("fastrnn._ops", ["csrc/ops.cpp"]), Extension("fastrnn._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": NinjaBuild},
)
