"""module.step(): one step onto states that the caller owns, for control loops and streams: the kernels allocate nothing
for it, and write the new states over the old ones.

What the operator does not serve or refuses goes the long way, which finds the words for what is wrong and, where
nothing is, calls forward and copies: other devices, autocast, function transforms, dropout between layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastrnn import functional, ops
from fastrnn.frozen import undisturbed
from fastrnn.plan import REAL, precision

_STEP = """One step onto the states `hx`, which are overwritten. Like {forward}, but nothing is recorded for
    backward, and no memory is allocated.

    Args:
        input: (B, I), or (I,) unbatched.
        hx: {hx}; without B if unbatched. Contiguous, of input's dtype and device, or copies are made.
        reset: bool (B,), 0-d unbatched: rows that start anew, from `reset_state`.
        reset_state: like hx, or with B = 1 for the same in every row; None is zero.

    Returns:
        {returns}

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; or torch.nn's own errors.
    """


def steppable(packing, layered: bool):
    """Class decorator: step(). packing(module) -> frozen.Packing; layered: states have a dimension of layers."""

    def decorate(kind: type) -> type:
        def step(self, input, hx, *, reset=None, reset_state=None):
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return step(self, input, hx, reset=reset, reset_state=reset_state)
            if not _onto(self, packing, input, hx, reset, reset_state):
                _by_forward(self, packing(self), layered, input, hx, reset, reset_state)
            if not layered:
                return hx
            h = hx if isinstance(hx, Tensor) else hx[0]
            return h[-1], hx

        one, pair = ("h (B, hidden_size)", "(h, c), both (B, hidden_size)")
        forward, returns = "forward", "hx."
        if layered:
            one, pair = "h (L, B, H_out)", "(h (L, B, H_out), c (L, B, hidden_size))"
            forward, returns = "forward with T = 1", "(output, hx); output (B, H_out) is a view of the last layer's h."
        hx = pair if "LSTM" in kind.__name__ else one
        step.__doc__ = _STEP.format(forward=forward, hx=hx, returns=returns)
        step.__qualname__ = f"{kind.__qualname__}.step"
        kind.step = step
        return kind

    return decorate


def _onto(module, packing, input, hx, reset, reset_state) -> bool:
    """Whether the operator has done it."""
    (h, c), (h_reset, c_reset) = _pair(hx), _pair(reset_state)
    if reset_state is not None and (c is None) is not (c_reset is None):
        return False
    compiling = torch.compiler.is_compiling()
    if not compiling and not (undisturbed() and type(input) in REAL and type(h) in REAL):
        return False
    if not isinstance(input, Tensor) or input.dim() != 2 or (module.training and getattr(module, "dropout", 0)):
        return False
    frozen = None if compiling else module.__dict__.get("_frozen")
    if frozen is not None and frozen.serves(module):
        cell, weights, packed, layers = "", [], frozen.packed, getattr(module, "num_layers", 1)
    else:
        cell, weights, _, bidirectional, layers = packing(module)
        packed = None
        if bidirectional or not input.is_cpu:
            return False
    try:
        ops.step_onto(h, c, cell, input, weights, packed, layers, reset, h_reset, c_reset, precision(input.dtype))
    except (RuntimeError, TypeError, ValueError):
        return False
    if not compiling:
        # An operator of a library does not do so by itself, unless it has rules for autograd.
        increment_version(h if c is None else (h, c))
    return True


def _pair(state) -> tuple:
    """(h, c), with None for a c that there is not."""
    return tuple(state) if isinstance(state, (tuple, list)) and len(state) == 2 else (state, None)


def _by_forward(module, packing, layered: bool, input, hx, reset, reset_state) -> None:
    """A step by forward, copied onto hx."""
    lstm = packing.cell == "lstm"
    if packing.bidirectional:
        raise ValueError("step: expected a module of one direction, got a bidirectional one, which needs the sequence")
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if input.dim() not in (1, 2):
        raise ValueError(f"input: expected shape (B, I) or (I,), got {tuple(input.shape)}")
    states = hx if lstm else (hx,)
    if not isinstance(states, (tuple, list)) or len(states) != (2 if lstm else 1):
        raise TypeError(f"hx: expected a pair (h, c) of tensors to write to, got {type(hx).__name__}")
    for state in states:
        if not isinstance(state, Tensor):
            raise TypeError(f"hx: expected tensors to write to, got {type(state).__name__}")
    unbatched, B = input.dim() == 1, 1 if input.dim() == 1 else input.size(0)
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            raise TypeError(
                f"reset: expected a tensor of torch.bool, got {getattr(reset, 'dtype', type(reset).__name__)}"
            )
        if tuple(reset.shape) != (() if unbatched else (B,)):
            expected = "a 0-d tensor" if unbatched else f"shape (B,) = ({B},)"
            raise ValueError(f"reset: expected {expected}, got shape {tuple(reset.shape)}")
    if layered:
        new = _forward_layers(module, input, hx, reset, reset_state)
    else:
        new = _forward_cell(module, packing.cell, input, hx, states, reset, reset_state)
    for state, value in zip(states, new if lstm else (new,)):
        state.copy_(value)


def _forward_layers(module, input, hx, reset, reset_state):
    time = 1 if module.batch_first and input.dim() == 2 else 0
    reset = None if reset is None else reset.unsqueeze(time)
    return module.forward(input.unsqueeze(time), hx, reset=reset, reset_state=reset_state)[1]


def _forward_cell(module, cell, input, hx, states, reset, reset_state):
    if reset_state is not None:
        unbatched, B, H = input.dim() == 1, 1 if input.dim() == 1 else input.size(0), module.hidden_size
        # As of one layer.
        lifted = [t.unsqueeze(0) if isinstance(t, Tensor) else t for t in _pair(reset_state)]
        lifted = tuple(lifted) if cell == "lstm" else lifted[0]
        found = functional.check_reset_state(cell, lifted, input, 1, B, H, H, unbatched)
        starts = [t.squeeze(0) for t in _pair(found) if t is not None]
        starts = [t.squeeze(0) for t in starts] if unbatched else starts
    else:
        starts = [0.0] * len(states)
    if reset is not None:
        cut = [torch.where(reset.unsqueeze(-1), start, state) for start, state in zip(starts, states)]
        hx = tuple(cut) if cell == "lstm" else cut[0]
    return module.forward(input, hx)
