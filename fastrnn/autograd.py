"""The one autograd.Function: a layer on the kernels, with back-propagation through time on the kernels.

Bypassed when nothing needs a gradient. A backward that is itself to be differentiated (create_graph) recomputes the
layer through reference.py, so second and higher derivatives are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import ops, reference


class _Layer(torch.autograd.Function):
    # ctx in forward, not setup_context, which costs twice as much a call and is only for function transforms; those
    # never come here. `output` is not saved: callers may change it in place before backward, as torch lets them.
    @staticmethod
    def forward(
        ctx, cell, bidirectional, batch_major, all_states, slots, batch_sizes, lengths, reset, *tensors
    ) -> tuple[Tensor, ...]:
        input, h0, c0, *weights = tensors if slots is None else _spread(tensors, slots)
        output, h_n, c_n, h_all, c_all, tape = ops.layer(
            cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, all_states, True
        )
        ctx.save_for_backward(batch_sizes, lengths, reset, tape, *tensors)
        ctx.set_materialize_grads(False)
        ctx.arguments = (cell, bidirectional, batch_major, all_states, slots)
        if cell != "lstm":
            return (output, h_n, h_all) if all_states else (output, h_n)
        return (output, h_n, c_n, h_all, c_all) if all_states else (output, h_n, c_n)

    @staticmethod
    def backward(ctx, *grads):
        cell, bidirectional, batch_major, all_states, slots = ctx.arguments
        batch_sizes, lengths, reset, tape, *tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[8:])
        if slots is None:
            spread, needs = tensors, needed
        else:
            spread, needs = _spread(tensors, slots), _spread(needed, slots)
        input, h0, c0, *weights = spread
        needs = [bool(n) and t is not None for n, t in zip(needs, spread)]
        if cell != "lstm":
            d_output, d_h_n, d_h_all = (*grads, None)[:3]
            d_c_n = d_c_all = None
        else:
            d_output, d_h_n, d_c_n, d_h_all, d_c_all = (*grads, None, None)[:5]

        incoming = (d_output, d_h_n, d_c_n, d_h_all, d_c_all)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            arguments = (cell, batch_sizes, lengths, reset, bidirectional, all_states)
            with torch.autocast(input.device.type, enabled=False):
                results = _differentiable(arguments, spread, needs, incoming)
        else:
            arguments = (cell, input, h0, c0, weights, batch_sizes, lengths, reset, tape, *incoming)
            results = ops.layer_backward(*arguments, bidirectional, batch_major, needs)
            results = [r if n else None for r, n in zip(results, needs)]
        if slots is not None:
            results = _gather(results, slots, len(tensors))
        return (None,) * 8 + tuple(results)


class _Step(torch.autograd.Function):
    """One step of a cell: input (B, I), states (B, ...)."""

    @staticmethod
    def forward(ctx, cell, slots, *tensors):
        input, h0, c0, *weights = tensors if slots is None else _spread(tensors, slots)
        h, c, tape = ops.step(cell, input, h0, c0, weights, True)
        ctx.save_for_backward(tape, *tensors)
        ctx.set_materialize_grads(False)
        ctx.arguments = (cell, slots)
        return (h, c) if cell == "lstm" else h

    @staticmethod
    def backward(ctx, d_h, d_c=None):
        cell, slots = ctx.arguments
        tape, *tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[2:])
        spread, needs = (tensors, needed) if slots is None else (_spread(tensors, slots), _spread(needed, slots))
        needs = [bool(n) and t is not None for n, t in zip(needs, spread)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            d_h, d_c = None if d_h is None else d_h[None], None if d_c is None else d_c[None]
            arguments, grads = (cell, None, None, None, False, False), (None, d_h, d_c, None, None)
            lifted = [*(None if t is None else t[None] for t in spread[:3]), *spread[3:]]
            with torch.autocast(spread[0].device.type, enabled=False):
                results = _differentiable(arguments, lifted, needs, grads)
            results[:3] = [None if r is None else r.squeeze(0) for r in results[:3]]
        else:
            input, h0, c0, *weights = spread
            results = ops.layer_backward(
                cell, input, h0, c0, weights, None, None, None, tape, None, d_h, d_c, None, None, False, False, needs
            )
            results = [r if n else None for r, n in zip(results, needs)]
        if slots is not None:
            results = _gather(results, slots, len(tensors))
        return (None, None, *results)


def _spread(unique, slots):
    return [None if s is None else unique[s] for s in slots]


def _gather(results, slots, count):
    """Sums the gradients of the slots that hold one and the same tensor."""
    sums = [None] * count
    for result, slot in zip(results, slots):
        if slot is not None and result is not None:
            sums[slot] = result if sums[slot] is None else sums[slot] + result
    return sums


def _unique(tensors):
    """The distinct tensors by identity, and the place of each argument among them (None for an absent one)."""
    unique, slots = [], []
    for tensor in tensors:
        if tensor is None:
            slots.append(None)
            continue
        for place, known in enumerate(unique):
            if known is tensor:
                slots.append(place)
                break
        else:
            slots.append(len(unique))
            unique.append(tensor)
    return unique, tuple(slots)


def _differentiable(arguments, tensors, needs, grads):
    """The gradients as a differentiable function of the saved tensors and of the incoming gradients."""
    cell, batch_sizes, lengths, reset, bidirectional, all_states = arguments
    # A fresh alias for each argument, because an argument may be used twice, or be computed from another one, and its
    # gradient here is that of its own place alone.
    alias = [None if t is None else t.view_as(t) for t in tensors]
    outputs = reference.layer(cell, *alias[:3], alias[3:], batch_sizes, lengths, reset, bidirectional, all_states)
    pairs = [(o, g) for o, g in zip(outputs, grads) if o is not None and g is not None and o.requires_grad]
    wanted = [a for a, n in zip(alias, needs) if n]
    found = iter(())
    if pairs and wanted:
        outputs, grads = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found, None) if n else None for n in needs]


def layer(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    bidirectional: bool,
    batch_major: bool,
    all_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`ops.layer`, differentiable. Returns output, h_n, c_n, h_all, c_all; None for what the cell or call has not."""
    if not needed(input, h0, c0, weights):
        output, h_n, c_n, h_all, c_all, _ = ops.layer(
            cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, all_states, False
        )
        lstm = cell == "lstm"
        return (
            output,
            h_n,
            c_n if lstm else None,
            h_all if all_states else None,
            c_all if lstm and all_states else None,
        )
    tensors, slots = (input, h0, c0, *weights), None
    if torch.compiler.is_compiling():  # Dynamo refuses a Function that is given one tensor twice; eager does not mind
        tensors, slots = _unique(tensors)
    found = _Layer.apply(cell, bidirectional, batch_major, all_states, slots, batch_sizes, lengths, reset, *tensors)
    if cell == "lstm":
        return found if all_states else (*found, None, None)
    output, h_n, *h_all = found
    return output, h_n, None, h_all[0] if all_states else None, None


def step(
    cell: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """`ops.step`, differentiable: input (B, I), states (B, ...). Returns h, c; None for the c of a cell without one."""
    if not needed(input, h0, c0, weights):
        h, c, _ = ops.step(cell, input, h0, c0, weights, False)
        return h, c if cell == "lstm" else None
    tensors, slots = (input, h0, c0, *weights), None
    if torch.compiler.is_compiling():
        tensors, slots = _unique(tensors)
    found = _Step.apply(cell, slots, *tensors)
    return found if cell == "lstm" else (found, None)


def needed(input, h0, c0, weights) -> bool:
    """Whether a call has to be recorded for backward."""
    if not torch.is_grad_enabled():
        return False
    if input.requires_grad or (h0 is not None and h0.requires_grad) or (c0 is not None and c0.requires_grad):
        return True
    for w in weights:
        if w.requires_grad:
            return True
    return False
