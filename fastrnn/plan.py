"""The one place that chooses who computes a call (fastrnn's kernels, by themselves or as transforms.py has them
batched and differentiated; torch's own implementation; or reference.py),
and in what dtypes, which under autocast is a matter of its own. The functions, the modules and `explain` all ask here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fastrnn.ops import _C, EXACT, TF32

# The kernels are those of the device that the tensors are on.
KERNEL, TRANSFORMED, TORCH, REFERENCE = "fastrnn kernel", "fastrnn kernel, transformed", "torch", "reference"
# The forms of a call, which torch gives to different functions.
DENSE, PACKED, STEP = "dense", "packed", "step"
CUDA_BUILT = bool(_C.build_info()["cuda_architectures"])
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REAL = (Tensor, torch.nn.Parameter, torch.nn.Buffer)  # types of tensors that do not stand for others
_PLAIN = (*REAL, FakeTensor, FunctionalTensor)


class Route(NamedTuple):
    """Who computes a call, and in what dtypes: `work` inside, `h` and `c` of the results (h's also the output's).

    cast: the arguments may be of other dtypes than `work`.
    """

    path: str
    reason: str
    work: torch.dtype | None = None
    h: torch.dtype | None = None
    c: torch.dtype | None = None
    cast: bool = True


def _routes(reason: str) -> dict[torch.dtype, Route]:
    """To the kernels, for calls that are all of one dtype."""
    return {d: Route(KERNEL, reason.format(str(d)[6:]), d, d, d, False) for d in _DTYPES}


SERVED = _routes("{} on the CPU is served by fastrnn's kernels")
_ON_GPU = {
    path: _routes(f"FASTRNN_GPU_PATH={path} takes {{}} on a GPU to fastrnn's kernels")
    for path in _C.gpu_paths()
    if path != "torch"
}


def plan(cell: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights, form: str, extended: bool) -> Route:
    """Chooses the implementation for a call whose shapes are valid.

    form: DENSE, PACKED or STEP (of a cell); it decides dtypes in autocast.
    extended: reset, lengths or all_states is used, which torch has not.
    """
    dtype, on_cpu, served = input.dtype, input.is_cpu, SERVED
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type)
    reason = None
    transform = _transform()
    if torch._C._get_tracing_state() is not None:
        reason = "torch.jit.trace is recording, and a graph of torch's operators loads without fastrnn"
    elif torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        reason = "ONNX export: ONNX knows torch's operators"
    elif not (on_cpu or input.is_meta):
        served, reason = _on_gpu() if input.is_cuda else ({}, f"no kernel for device {input.device.type} yet")
    if reason is None and dtype not in served:
        reason = f"no kernel for dtype {dtype}"
    if reason is None:
        for tensor in (input, h0, c0, *weights):
            if tensor is None:
                continue
            if tensor.dtype is not dtype and not autocast:
                reason = f"the dtypes of the arguments differ: {dtype} and {tensor.dtype}"
                break
            if tensor.is_cpu is not on_cpu or not (on_cpu or tensor.device == input.device):
                reason = f"the devices of the arguments differ: {input.device} and {tensor.device}"
                break
            if tensor.layout is not torch.strided:
                reason = f"no kernel for the layout {str(tensor.layout)[6:]}"
                break
            if type(tensor) not in _PLAIN:
                reason = f"an argument is of the tensor subclass {type(tensor).__name__}"
                break
    if reason is None and transform is not None:
        reason, extended = transform, True
        if transform is _RULES and not input.is_meta and not autocast:
            return Route(TRANSFORMED, reason, dtype, dtype, dtype)
    if reason is None and not autocast:
        return served[dtype]
    if not autocast:
        return Route(REFERENCE if extended else TORCH, reason, dtype, dtype, dtype)
    return _plan_autocast(cell, input, h0, c0, weights, form, extended, served, reason)


def _on_gpu() -> tuple[dict[torch.dtype, Route], str | None]:
    """The routes of calls on a CUDA device, and why there are none."""
    path = _gpu_path()
    if not CUDA_BUILT:
        return {}, "this build has no CUDA kernels"
    if path == "torch":
        return {}, "FASTRNN_GPU_PATH=torch leaves CUDA tensors to torch"
    if not path:
        return {}, "no CUDA kernel has been checked on a card yet; FASTRNN_GPU_PATH=step takes them"
    return _ON_GPU[path], None


_RULES = "vmap or grad is active, for which the kernels have rules"
_FORWARD = "forward-mode differentiation is active"
_HIGHER = "a function transform is active that the kernels have no rule for (jvp, or grad of grad)"


def _transform() -> str | None:
    """What function transforms and forward-mode differentiation make of a call; None when there are none."""
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            return _HIGHER
        kinds = [interpreter.key() for interpreter in get_interpreter_stack()]
        gradients = kinds.count(TransformType.Grad)
        return _RULES if gradients + kinds.count(TransformType.Vmap) == len(kinds) and gradients < 2 else _HIGHER
    return _FORWARD if forward_ad._current_level >= 0 else None


dispatch_modes = torch._C._len_torch_dispatch_stack
# What makes more of an eager call than a computation, by transforming, tracing, intercepting or casting it: functions
# that torch.compile cannot trace.
OBSERVERS = (
    torch._C._is_any_autocast_enabled,
    torch._C._are_functorch_transforms_active,
    dispatch_modes,
    torch._C._get_tracing_state,
)


def precision(work: torch.dtype, on_gpu: bool = False) -> int:
    """How much of `work` the products of a call keep: what torch's switch for RNNs on the device allows, which concerns
    float32 alone, where the kernels are the faster for it."""
    if work is not torch.float32:
        return EXACT
    return _gpu_precision() if on_gpu else cpu_precision()


def fp32_precision(on_gpu: bool = False) -> str:
    """That switch: torch.backends.mkldnn.rnn.fp32_precision, or torch.backends.cudnn.rnn.fp32_precision, which
    torch.backends.cudnn.allow_tf32, the older one, sets too."""
    return _fp32_precision("cuda" if on_gpu else "mkldnn", "rnn")


_fp32_precision = torch._C._get_fp32_precision_getter


def cpu_precision() -> int:
    """The same for float32 on the CPU."""
    asked = _fp32_precision("mkldnn", "rnn")
    return EXACT if asked == "none" else _C.allowed_precision(asked)


def _gpu_precision() -> int:
    return TF32 if fp32_precision(True) == "tf32" else EXACT


def _gpu_path() -> str:
    return _C.gpu_path()


def _onednn_enabled() -> bool:
    return torch._C._get_mkldnn_enabled()


def _cudnn_enabled() -> bool:
    return torch._C._has_cudnn and torch._C._get_cudnn_enabled()


def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


# What torch.compiler.assume_constant_result does, without importing all of Dynamo here: torch.compile reads the
# switches once, at compile time.
for _switch in (cpu_precision, _gpu_precision, _gpu_path, _onednn_enabled, _cudnn_enabled, _cudnn_version):
    _switch._dynamo_marked_constant = True


def _plan_autocast(cell, input, h0, c0, weights, form, extended, served, reason) -> Route:
    """The dtypes that torch.nn's classes return under autocast, where fastrnn computes.

    On the CPU torch casts what enters a matrix product and promotes the rest: the plain RNN comes out in autocast's
    dtype, GRU and LSTM in the wider of that and the state's. Only oneDNN's LSTM (dense input, no projection) is cast as
    a whole; a projection casts h once more. Where the result is float32 the kernels compute in float32.

    On a GPU everything is cast: by cuDNN's RNNs to float16 whatever autocast's dtype is (aten/src/ATen/cudnn/
    AutocastRNN.cpp says at::kHalf), elsewhere to autocast's dtype.
    """
    low = torch.get_autocast_dtype(input.device.type)
    on_gpu = input.device.type == "cuda"
    whole = torch.float16 if on_gpu and form is not STEP and _cudnn_serves(input) else low
    tensors = [t for t in (input, h0, c0, *weights) if t is not None]
    if reason is None and any(t.dtype not in (torch.float32, low, whole) for t in tensors):
        if all(t.dtype == torch.float64 for t in tensors):
            return served[torch.float64]  # autocast leaves float64 alone
        reason = "autocast with other dtypes than float32 and its own"
    projection = cell == "lstm" and weights[1].size(1) * 4 != weights[1].size(0)
    state = input if h0 is None else h0 if c0 is None else c0
    work = low if cell.startswith("rnn") else torch.promote_types(low, state.dtype)
    if on_gpu:
        work = whole
    elif (
        cell == "lstm"
        and form is DENSE
        and not projection
        and _onednn_enabled()
        and input.numel()
        and (low == torch.bfloat16 or input.dtype == torch.float32 or not torch.is_grad_enabled())
    ):
        work = low
    h = low if projection and not on_gpu else work
    path = KERNEL if reason is None else REFERENCE if extended else TORCH
    return Route(path, reason or f"autocast to {str(low)[6:]}, computed in {str(work)[6:]}", work, h, work)


def _cudnn_serves(input: Tensor) -> bool:
    """Whether torch's RNNs give a CUDA tensor to cuDNN (aten/src/ATen/native/RNN.cpp: use_cudnn)."""
    if not _cudnn_enabled() or not input.numel():
        return False
    return input.dtype is not torch.bfloat16 or _cudnn_version() >= 91300
