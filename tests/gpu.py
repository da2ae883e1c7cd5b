"""What the tests on a GPU (test_cuda_*.py) share: whether they can run, forcing a path, precisions, data on the card.

On CUDA tensors fastrnn leaves the work to torch unless a path is forced, so every test here forces one. A path that
cannot serve a call hands it to "step" and says so in `fastrnn.explain`; `served` tells which one it was.
"""

import contextlib

import fastrnn._C as _C
import pytest
import torch

import fastrnn

RESIDENT = ["block", "cluster", "grid"]  # w_hh stays on the chip; "step" is one product and one kernel for each step
PATHS = ["step", *RESIDENT]
# What torch is asked for: a dtype, and for float32 whether products may round their factors to TF32.
PRECISIONS = {
    "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}  # fmt: skip


def lacking():
    """Why nothing here can run, or None."""
    if not torch.cuda.is_available():
        return "needs a GPU: torch.cuda.is_available() is False here"
    if not _C.build_info()["cuda_architectures"]:
        return "needs CUDA kernels: this build holds none (FASTRNN_CUDA=1, with nvcc)"
    return None


needs_card = pytest.mark.skipif(lacking() is not None, reason=lacking() or "")
every_path = pytest.mark.parametrize("path", PATHS)


@contextlib.contextmanager
def forced(path):
    """Inside, layers on a GPU take this path ("torch": torch's own implementation)."""
    _C.set_gpu_path(path)
    try:
        yield
    finally:
        _C.set_gpu_path("")


@contextlib.contextmanager
def asked_for(precision):
    """torch's switch for the precision of RNNs on a GPU, which concerns float32 alone."""
    switch = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextlib.contextmanager
def without_cudnn(really=True):
    """cuDNN refuses sequences of more than 65,535 steps; torch's other implementation takes them."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and not really
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def suited(rule, precision):
    """The rule for a precision. TF32 keeps as many bits of a factor as float16 does, so its tiny is float16's; cuDNN
    does not use it for every shape."""
    if precision == "tf32":
        rule.tiny, rule.insane = {torch.float32: rule.tiny[torch.float16]}, {torch.float32: rule.insane[torch.float16]}
    return rule


def on_card(values):
    """Tensors of numbers, on the card; lengths (integers) stay where they are."""
    return tuple(v.cuda() if v.is_floating_point() else v for v in values)


def served(module, *args, **options):
    """The path that every layer of this call would take going forward, of PATHS; None where torch has it."""
    plan = fastrnn.explain(module, *args, **options)
    paths = {text.replace(",", " ").split()[0] for text in plan.splits} & set(PATHS)
    assert len(paths) <= 1, str(plan)
    return paths.pop() if paths else None
