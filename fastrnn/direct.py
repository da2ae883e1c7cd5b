"""Calls of modules and cells by the shortest way: past torch's dispatcher, whose share of a call of few steps is larger
than the kernel's. Where gradients are wanted, autograd.py records what has been computed.

csrc/direct.cpp does it. It reads the module's weights and the tensors of the call as they are, by DLPack's C exchange
API, and declines whatever is not plainly right, and everything that something traces, transforms, intercepts, casts or
profiles. That goes the long way, by the operators, as everything does where torch has no such API.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fastrnn import autograd, plan
from fastrnn.ops import _C
from fastrnn.recording import recorder_of

AVAILABLE = _C.use_torch(
    Tensor,
    torch.nn.Parameter,
    getattr(Tensor, "__dlpack_c_exchange_api__", None),
    (
        *plan.OBSERVERS,
        torch._C._len_torch_function_stack,
        torch.autograd._profiler_enabled,  # a profile is to show the operator
    ),
    vars(forward_ad),
    torch._C._get_fp32_precision_getter,
)
# Where this torch does not say, there might be some.
_hooks_of_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _tracing: ())


def forward(module: torch.nn.Module, cell: str, layered: bool, input, hx):
    """What forward(input, hx) of a module (layered) or cell returns; None when it is to go the long way."""
    if torch.compiler.is_compiling():
        return None
    if not torch.is_grad_enabled():
        return _C.forward(cell, module.__dict__, layered, input, hx)
    # A checkpoint, whose hooks these are, may go the long way on its second pass, and wants the same tensors saved.
    if _hooks_of_saved_tensors(True) is not None:
        return None
    if recorder_of(module) is not None or (layered and getattr(module, "recompute", False)):
        return None
    found = _C.recorded(cell, module.__dict__, layered, input, hx)
    if not found:  # False: nothing of it requires a gradient
        return None if found is None else _C.forward(cell, module.__dict__, layered, input, hx)
    *found, tensors = found
    layout = (1, False, False, False)
    if layered:
        layout = (module.num_layers, True, module.bidirectional, module.batch_first)
    results = autograd.record(cell, layout, *found, *tensors)
    if layered:
        output, *states = results
        return output, tuple(states) if cell == "lstm" else states[0]
    return results if cell == "lstm" else results[0]


def step(module: torch.nn.Module, cell: str, layered: bool, input, hx, reset, reset_state) -> bool:
    """Whether it has done a step onto hx. When not, nothing has been written, and it is to go the long way."""
    if torch.compiler.is_compiling():
        return False
    if not _C.step_onto(cell, module.__dict__, layered, input, hx, reset, reset_state):
        return False
    increment_version(hx)
    return True
