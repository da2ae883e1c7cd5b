"""module.step(): one step onto states that the caller owns, for control loops and streams: the kernels allocate nothing
for it, and write the new states over the old ones.

What the operator does not serve goes the long way, which finds the words for what is wrong and, where nothing is, calls
forward and copies: other devices and strides, autocast, function transforms, dropout between layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastrnn import direct, ops
from fastrnn.frozen import kept
from fastrnn.plan import SERVED, STEP, plan, precision

_STEP = """One step onto the states `hx`, which are overwritten. Like {forward}, but nothing is recorded for
    backward, and no memory is allocated.

    Args:
        input: (B, I), or (I,) unbatched.
        hx: {hx}; without B if unbatched. Of input's dtype and device, without gradient. Contiguous, or copies are made.
        reset: bool (B,), 0-d unbatched: rows that start anew, from `reset_state`.
        reset_state: like hx, or with B = 1 for the same in every row; None is zero.

    Returns:
        {returns}

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; or torch.nn's own errors.
    """


def steppable(packing, cell, layered: bool):
    """Class decorator: step(). packing(module) -> frozen.Packing; cell(module) -> its name for the operator; layered:
    states have a dimension of layers."""

    def decorate(kind: type) -> type:
        lstm = "LSTM" in kind.__name__

        def step(self, input, hx, *, reset=None, reset_state=None):
            if not direct.step(self, cell(self), layered, input, hx, reset, reset_state):
                with torch.no_grad():
                    _step(self, packing(self), layered, input, hx, reset, reset_state)
            if not layered:
                return hx
            return (hx[0] if lstm else hx)[-1], hx

        one, pair = ("h (B, hidden_size)", "(h, c), both (B, hidden_size)")
        forward, returns = "forward", "hx."
        if layered:
            one, pair = "h (L, B, H_out)", "(h (L, B, H_out), c (L, B, hidden_size))"
            forward, returns = "forward with T = 1", "(output, hx); output (B, H_out) is a view of the last layer's h."
        step.__doc__ = _STEP.format(forward=forward, hx=pair if lstm else one, returns=returns)
        step.__qualname__ = f"{kind.__qualname__}.step"
        kind.step = step
        return kind

    return decorate


def _step(module, packing, layered: bool, input, hx, reset, reset_state) -> None:
    states = _checked(packing, input, hx)
    starts = reset_state if packing.cell == "lstm" else (reset_state,)
    if reset is not None:
        _check_reset(reset, input)
        if reset_state is not None:
            starts = _check_starts(packing, module, layered, reset_state, input)
    if reset is None or reset_state is None:
        starts = (None,) * len(states)
    if _served(module, packing, layered, input, states, reset, starts):
        (h, c), (h_reset, c_reset) = (*states, None)[:2], (*starts, None)[:2]
        cell, weights, _, _, layers = packing
        packed = kept(module, input)
        try:
            ops.step_onto(
                h, c, cell, input, [] if packed is not None else weights, packed, layers, reset, h_reset, c_reset,
                precision(input.dtype),
            )  # fmt: skip
        except RuntimeError:
            _check_apart(states)
            raise
        if not torch.compiler.is_compiling():  # there the graph knows what the operator writes to
            increment_version(states)
        return
    _check_apart(states)
    new = _forward(module, packing.cell, layered, input, hx, states, reset, starts)
    for state, value in zip(states, new):
        state.copy_(value)


def _checked(packing, input, hx) -> tuple[Tensor, ...]:
    """The states, if they are such as can be written to."""
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
        if state.requires_grad:
            raise ValueError("hx: expected states without gradient (detach() them), got one that requires it")
    return tuple(states)


def _check_apart(states) -> None:
    if len(states) == 2 and not torch.compiler.is_compiling() and _overlap(*states):
        raise ValueError("hx: expected h and c in memory of their own, got two that share some")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory of two tensors, from the first to the last value, has bytes in common."""
    if not (a.numel() and b.numel()) or a.device != b.device or a.is_meta:
        return False
    ends = [
        t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) for t in (a, b)
    ]
    return a.data_ptr() < ends[1] and b.data_ptr() < ends[0]


def _check_reset(reset, input: Tensor) -> None:
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        raise TypeError(f"reset: expected a tensor of torch.bool, got {getattr(reset, 'dtype', type(reset).__name__)}")
    if reset.shape != input.shape[:-1]:
        expected = "a 0-d tensor" if input.dim() == 1 else f"shape (B,) = ({input.size(0)},)"
        raise ValueError(f"reset: expected {expected}, got shape {tuple(reset.shape)}")
    if reset.device != input.device:
        raise ValueError(f"reset: expected device {input.device} as input's, got {reset.device}")


def _check_starts(packing, module, layered: bool, reset_state, input: Tensor) -> tuple[Tensor, ...]:
    """The reset states, of B rows or one."""
    lstm, widths = packing.cell == "lstm", [getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size]
    starts = reset_state if lstm else (reset_state,)
    if lstm and (not isinstance(starts, (tuple, list)) or len(starts) != 2):
        raise TypeError(f"reset_state: expected a pair (h, c), got {type(reset_state).__name__}")
    lead = (packing.num_layers,) if layered else ()
    for start, width in zip(starts, widths):
        if not isinstance(start, Tensor):
            raise TypeError(f"reset_state: expected tensors, got {type(start).__name__}")
        shapes = [(*lead, width)] if input.dim() == 1 else [(*lead, rows, width) for rows in (input.size(0), 1)]
        if tuple(start.shape) not in shapes:
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            raise ValueError(f"reset_state: expected shape {expected}, got {tuple(start.shape)}")
        if start.device != input.device:
            raise ValueError(f"reset_state: expected device {input.device} as input's, got {start.device}")
    return tuple(starts)


def _served(module, packing, layered: bool, input, states, reset, starts) -> bool:
    """Whether the operator takes these arguments, as far as can be told without their values."""
    cell, weights, _, _, layers = packing
    if input.dim() != 2 or not input.is_cpu or (module.training and getattr(module, "dropout", 0)):
        return False
    if not all(isinstance(w, Tensor) for w in weights):
        return False
    route = plan(cell, input, states[0], states[-1], [*weights, *starts], STEP, False)
    if route is not SERVED.get(input.dtype):
        return False
    B, H = input.size(0), module.hidden_size
    lead = (layers, B) if layered else (B,)
    for state, width in zip(states, (getattr(module, "proj_size", 0) or H, H)):
        if tuple(state.shape) != (*lead, width) or not state.is_contiguous():
            return False
    return input.size(1) == module.input_size and len({t.size(-2) for t in starts if t is not None}) < 2


def _forward(module, cell: str, layered: bool, input, hx, states, reset, starts) -> tuple[Tensor, ...]:
    """The new states, by forward."""
    if layered:
        time = 1 if module.batch_first and input.dim() == 2 else 0
        reset = None if reset is None else reset.unsqueeze(time)
        start = None if starts[0] is None else starts if cell == "lstm" else starts[0]
        new = module.forward(input.unsqueeze(time), hx, reset=reset, reset_state=start)[1]
    else:
        expected = (*input.shape[:-1], module.hidden_size)
        if reset is not None and all(tuple(s.shape) == expected for s in states):  # else forward has the words
            cut = reset.unsqueeze(-1)
            states = [torch.where(cut, 0.0 if t is None else t.to(s.dtype), s) for s, t in zip(states, starts)]
            hx = tuple(states) if cell == "lstm" else states[0]
        new = module.forward(input, hx)
    return new if cell == "lstm" else (new,)
