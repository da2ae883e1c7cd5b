"""module.freeze(): weights that stay packed as the kernels read them, for inference.

Without it every call packs the weights anew, because torch does not say when they change (`_version` misses writes
through .data, numpy and fused optimizers). freeze() is the user's word that they will not.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastrnn import ops
from fastrnn.plan import SERVED


class Frozen:
    """Packed weights, and the parameters they were packed from."""

    __slots__ = ("packed", "dtype", "sources")

    def __init__(self, packed: Tensor, weights: dict[str, Tensor]):
        self.packed = packed
        self.dtype = next(iter(weights.values())).dtype
        # An inference tensor has no version.
        self.sources = [(name, w, None if w.is_inference() else w._version) for name, w in weights.items()]

    def serves(self, module: torch.nn.Module) -> bool:
        """Whether the module's weights are those that were packed, unchanged as far as torch counts changes."""
        parameters = module._parameters
        for name, source, version in self.sources:
            if parameters.get(name) is not source or (version is not None and source._version != version):
                return False
        return True

    def takes(self, tensor: Tensor) -> bool:
        """Whether an argument is of the weights' dtype, and where they are."""
        return tensor.dtype is self.dtype and tensor.is_cpu and tensor.layout is torch.strided

    def __deepcopy__(self, memo):
        if any(version is not None and source._version != version for _, source, version in self.sources):
            return None
        return Frozen(self.packed.clone(), {name: copy.deepcopy(source, memo) for name, source, _ in self.sources})

    def __reduce__(self):  # packed for this machine's instruction set: a pickle holds a module that is not frozen
        return _nothing, ()


def _nothing() -> None:
    return None


class Packing(NamedTuple):
    """What `ops.pack` is to have, and the name of each weight."""

    cell: str
    weights: list
    names: list[str]
    bidirectional: bool
    num_layers: int


def freezable(packing):
    """Class decorator: freeze(), and what undoes it. packing(module) -> Packing.

    Not a base class: with a second base, accelerate() could not give a torch.nn object its class.
    """

    def decorate(kind: type) -> type:
        base = kind.__base__

        def freeze(self):
            return _freeze(self, packing(self))

        def train(self, mode: bool = True):
            if mode:
                thaw(self)
            return base.train(self, mode)

        def _apply(self, fn, recurse: bool = True):
            thaw(self)
            return base._apply(self, fn, recurse)

        def _load_from_state_dict(self, *args, **kwargs):
            thaw(self)
            return base._load_from_state_dict(self, *args, **kwargs)

        freeze.__doc__ = _FREEZE
        train.__doc__ = base.train.__doc__
        for method in (freeze, train, _apply, _load_from_state_dict):
            method.__qualname__ = f"{kind.__qualname__}.{method.__name__}"
            setattr(kind, method.__name__, method)
        return kind

    return decorate


_FREEZE = """Packs the weights once, for calls that need no gradient: they then pack nothing. Returns self.

    Undone by train(), load_state_dict() and whatever moves or casts the module (to(), float(), cuda(), ...), of it or
    of a model it is part of. Of other changes to the weights, replaced parameters and writes in place that torch counts
    are noticed: the module then computes with its weights as they are, packing them at each call. Writes that torch
    does not count (through .data, numpy, a fused optimizer) are not: freeze again after them.

    Costs memory for a second copy of the weights, in float32 also for 16-bit ones. Calls that record for backward, want
    all_states, or run under autocast or torch.compile, use the weights themselves. A deep copy is frozen too, a pickle
    is not. Results are the same bits as without, except for one step of at most 4 rows, which is otherwise summed in
    another order.

    Raises:
        ValueError: a weight that no kernel serves (its device or dtype), or that is computed (a parametrization).
    """


def _freeze(module, packing: Packing):
    for name, weight in zip(packing.names, packing.weights):
        if module._parameters.get(name) is not weight:
            raise ValueError(f"{name}: expected a plain parameter to freeze, got one that is computed or assigned")
        if not (weight.is_cpu and weight.dtype in SERVED and weight.dtype is packing.weights[0].dtype):
            raise ValueError(
                f"{name}: expected a CPU tensor of float32, float64, bfloat16 or float16 to freeze, all weights of one "
                f"dtype, got {weight.dtype} on {weight.device}"
            )
    with torch.no_grad():
        packed = ops.pack(packing.cell, packing.weights, packing.bidirectional, packing.num_layers)
    module._frozen = Frozen(packed, dict(zip(packing.names, packing.weights)))
    return module


def thaw(module: torch.nn.Module) -> None:
    """Undoes freeze()."""
    module.__dict__.pop("_frozen", None)


def kept(module: torch.nn.Module) -> Tensor | None:
    """The packed weights of a frozen module; None when they cannot stand for its weights."""
    if torch.compiler.is_compiling() or _dispatch_modes():
        return None
    frozen = module.__dict__.get("_frozen")
    return frozen.packed if frozen is not None and frozen.serves(module) else None


_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled


def undisturbed() -> bool:
    """Whether a call is simply to be computed: nothing records, traces, transforms or casts it."""
    return not (
        torch.compiler.is_compiling()  # first: torch.compile cannot trace the others
        or torch.is_grad_enabled()
        or _autocast()
        or _functorch()
        or _dispatch_modes()
        or _tracing()
        or forward_ad._current_level >= 0
    )
