"""module.freeze(): weights that stay packed as the kernels read them, for inference.

Without it all but the shortest calls pack the weights anew, because torch does not say when they change (`_version`
misses writes through .data, numpy and fused optimizers). freeze() is the user's word that they will not.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn import autograd, ops
from fastrnn.plan import REAL, SERVED, Route, dispatch_modes, precision


class Frozen:
    """Packed weights, and the parameters they were packed from."""

    __slots__ = ("packed", "dtype", "precision", "kind", "sources")

    def __init__(self, packed: Tensor, weights: dict[str, Tensor], precision: int, kind: str | None):
        self.packed = packed
        self.dtype = next(iter(weights.values())).dtype
        self.precision = precision
        self.kind = kind
        # An inference tensor has no version.
        self.sources = [
            (name, w, None if w.is_inference() else w._version, w.data_ptr()) for name, w in weights.items()
        ]

    def serves(self, module: torch.nn.Module) -> bool:
        """Whether the module's weights are those that were packed, unchanged as far as torch counts changes, and packed
        for the precision that torch's switch asks for."""
        if _kind(module) != self.kind or precision(self.dtype) != self.precision:
            return False
        parameters = module._parameters
        for name, source, version, address in self.sources:
            if (
                parameters.get(name) is not source
                or (version is not None and source._version != version)
                or source.data_ptr() != address
            ):
                return False
        return True

    def __deepcopy__(self, memo):
        for _, source, version, address in self.sources:
            if (version is not None and source._version != version) or source.data_ptr() != address:
                return None
        copies = {name: copy.deepcopy(source, memo) for name, source, *_ in self.sources}
        return Frozen(self.packed.clone(), copies, self.precision, self.kind)

    def __reduce__(self):  # packed for this machine's instruction set: a pickle holds a module that is not frozen
        return _nothing, ()


def _nothing() -> None:
    return None


def _kind(module: torch.nn.Module) -> str | None:
    """What of the cell a user might change by assignment: tanh or relu."""
    attributes = module.__dict__
    return attributes.get("mode") or attributes.get("nonlinearity")


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
        def freeze(self):
            return _freeze(self, packing(self))

        def train(self, mode: bool = True):
            if mode:
                thaw(self)
            return super(kind, self).train(mode)

        def _apply(self, fn, recurse: bool = True):
            thaw(self)
            return super(kind, self)._apply(fn, recurse)

        def _load_from_state_dict(self, *args, **kwargs):
            thaw(self)
            return super(kind, self)._load_from_state_dict(*args, **kwargs)

        freeze.__doc__ = _FREEZE
        train.__doc__ = torch.nn.Module.train.__doc__
        for method in (freeze, train, _apply, _load_from_state_dict):
            method.__qualname__ = f"{kind.__qualname__}.{method.__name__}"
            setattr(kind, method.__name__, method)
        return kind

    return decorate


_FREEZE = """Packs the weights once, for calls that need no gradient: they then pack nothing. Returns self.

    Undone by train(), load_state_dict() and whatever moves or casts the module (to(), float(), cuda(), ...), of it or
    of a model it is part of. Of other changes to the weights, replaced parameters and writes in place that torch counts
    are noticed: the module then computes with its weights as they are, packing them at each call. Writes in place that
    torch does not count (into .data, by numpy, by a fused optimizer) are not: freeze again after them.

    Costs memory for a second copy of the weights, at most in float32 for 16-bit ones. Calls that record for backward,
    want all_states, or run under autocast or torch.compile, use the weights themselves. A deep copy is frozen too, a
    pickle is not. Results are the same bits as without, except for one step of at most 4 rows, or from hidden_size 96
    on where steps times rows are at most 8: those are otherwise summed in another order.

    Raises:
        ValueError: a weight that no kernel serves (its device, dtype or tensor subclass), that is computed (a
            parametrization), or whose shape is not the module's.
    """


def _freeze(module, packing: Packing):
    first, rows = packing.weights[0], ops.CELLS[packing.cell]["gates"] * module.hidden_size
    for name, weight in zip(packing.names, packing.weights):
        if not isinstance(weight, Tensor) or module._parameters.get(name) is not weight:
            raise ValueError(f"{name}: expected a plain parameter to freeze, got one that is computed or assigned")
        if type(weight) not in REAL:
            raise ValueError(f"{name}: expected a plain parameter to freeze, got a {type(weight).__name__}")
        if not (weight.is_cpu and weight.dtype in SERVED and weight.dtype is first.dtype):
            raise ValueError(
                f"{name}: expected a CPU tensor of float32, float64, bfloat16 or float16 to freeze, all weights of one "
                f"dtype, got {weight.dtype} on {weight.device}"
            )
        if not weight.dim() or (weight.size(0) != rows and not name.startswith("weight_hr")):
            raise ValueError(f"{name}: expected {rows} rows to freeze, got shape {tuple(weight.shape)}")
    if first.shape != (rows, module.input_size):
        expected = (rows, module.input_size)
        raise ValueError(f"{packing.names[0]}: expected shape {expected} to freeze, got {tuple(first.shape)}")
    kept_precision = precision(first.dtype)
    with torch.no_grad():
        packed = ops.pack(packing.cell, packing.weights, packing.bidirectional, packing.num_layers, kept_precision)
    module._frozen = Frozen(packed, dict(zip(packing.names, packing.weights)), kept_precision, _kind(module))
    return module


def thaw(module: torch.nn.Module) -> None:
    """Undoes freeze()."""
    module.__dict__.pop("_frozen", None)


def kept(module: torch.nn.Module, input: Tensor) -> Tensor | None:
    """The packed weights of a frozen module, for a call with this input; None when they cannot be used."""
    if torch.compiler.is_compiling() or dispatch_modes() or type(input) not in REAL:
        return None
    frozen = module.__dict__.get("_frozen")
    return frozen.packed if frozen is not None and frozen.serves(module) else None


def usable(route: Route, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], *starts) -> bool:
    """Whether a call on this route may use kept weights: it is neither cast nor recorded for backward."""
    return route is SERVED.get(route.work) and not autograd.needed(input, h0, c0, weights, *starts)
