"""The autograd.Functions: layers on the kernels, or one step, with back-propagation through time on the kernels; and
one that records what direct.py has computed.

Bypassed when nothing needs a gradient. A backward that is itself to be differentiated (create_graph) recomputes the
layers by transforms.py, whose gradients have gradients (in all of float32, whatever precision the forward pass was
allowed).
"""

from __future__ import annotations

import itertools

import torch
import torch._C._functorch as vmaps
from torch import Tensor

from fastrnn import ops, recompute, reference, transforms
from fastrnn.ops import _C


class _Layers(torch.autograd.Function):
    """Layers on top of each other, in one call each way: a Function costs more than a small layer."""

    # ctx in forward, not setup_context, which costs twice as much a call and is only for function transforms; those
    # never come here. `output` is not saved: callers may change it in place before backward, as torch lets them.
    @staticmethod
    def forward(
        ctx, cell, num_layers, saved_from, bidirectional, batch_major, all_states, precision, resets, chunked, slots,
        watcher, batch_sizes, lengths, reset, *tensors,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        input, h0, c0, *weights = tensors if slots is None else _spread(tensors, slots)
        weights, starts = (weights[:-2], weights[-2:]) if resets else (weights, ())
        arguments = (cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major)
        if chunked:
            starts = starts or (None, None)
            output, h_n, c_n, h_all, c_all, h_marks, c_marks, saved = recompute.forward(
                *arguments[:-1], num_layers, precision, *starts, batch_major, all_states
            )
            saved = [h_marks, c_marks, *saved]
        elif num_layers == 1:
            output, h_n, c_n, h_all, c_all, *saved = ops.layer(*arguments, all_states, True, precision, *starts)
        else:
            output, h_n, c_n, saved = ops.stack(*arguments, num_layers, saved_from, precision, *starts)
        ctx.save_for_backward(batch_sizes, lengths, reset, *tensors, *saved)
        ctx.set_materialize_grads(False)
        ctx.arguments = (cell, num_layers, bidirectional, batch_major, all_states, precision, resets, chunked, slots)
        ctx.watcher = watcher
        if cell != "lstm":
            return (output, h_n, h_all) if all_states else (output, h_n)
        return (output, h_n, c_n, h_all, c_all) if all_states else (output, h_n, c_n)

    @staticmethod
    def backward(ctx, *grads):
        cell, *_, slots = ctx.arguments
        needed = list(ctx.needs_input_grad[14:])
        batch_sizes, lengths, reset, *rest = ctx.saved_tensors
        tensors, saved = rest[: len(needed)], rest[len(needed) :]
        spread, needs = (tensors, needed) if slots is None else (_spread(tensors, slots), _spread(needed, slots))
        if cell != "lstm":
            d_output, d_h_n, d_h_all = (*grads, None)[:3]
            d_c_n = d_c_all = None
        else:
            d_output, d_h_n, d_c_n, d_h_all, d_c_all = (*grads, None, None)[:5]
        incoming = (d_output, d_h_n, d_c_n, d_h_all, d_c_all)
        sequences = (batch_sizes, lengths, reset)
        results = _gradients_of_layers(ctx.arguments[:-1], spread, needs, saved, sequences, incoming, ctx.watcher)
        if slots is not None:
            results = _gather(results, slots, len(tensors))
        return (None,) * 14 + tuple(results)


def _gradients_of_layers(arguments, spread, needs, saved, sequences, incoming, watcher=None):
    """From the gradients `incoming` of output, h_n, c_n, h_all, c_all those of the tensors `spread`, None where they
    are not needed. arguments: _Layers.forward's, but for the slots; sequences: batch_sizes, lengths, reset."""
    if _batched(incoming):
        return _one_by_one(lambda *g: _gradients_of_layers(arguments, spread, needs, saved, sequences, g), incoming)
    cell, num_layers, bidirectional, batch_major, all_states, precision, resets, chunked = arguments
    input, h0, c0, *weights = spread
    weights, starts = (weights[:-2], weights[-2:]) if resets else (weights, ())
    needs = [bool(n) and t is not None for n, t in zip(needs, spread)]
    given = (cell, input, h0, c0, weights, *sequences)

    def kernels(needs, watch=False):
        """What the backward operators return."""
        directions, last = (bidirectional, batch_major), (needs, precision, *starts)
        if watch:
            last = (needs, precision, *(starts or (None, None)), 1)
        if chunked:
            h_marks, c_marks, *tapes = saved
            return recompute.backward(
                *given, bidirectional, num_layers, precision, *(starts or (None, None)), h_marks, c_marks,
                tapes, *incoming, batch_major, needs, *((1,) if watch else ()),
            )  # fmt: skip
        if num_layers == 1:
            return ops.layer_backward(*given, *saved, *incoming, *directions, *last)
        return ops.stack_backward(*given, saved, *incoming[:3], *directions, num_layers, *last)

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if watcher is not None:
            with torch.no_grad():
                watcher.receive(*_watched(kernels([*needs[:3], *[False] * (len(needs) - 3)], True), needs))
        more = (*sequences, bidirectional, all_states)
        return _differentiable(cell, num_layers, spread, more, needs, incoming, resets)
    results = kernels(needs) if watcher is None else kernels(needs, True)
    if watcher is not None:
        watcher.receive(*_watched(results, needs))
    return [r if n else None for r, n in zip(results, needs)]


def _batched(grads) -> bool:
    """Whether incoming gradients are a batch of them: of torch's older vmap (is_grads_batched, vectorized Jacobians),
    or of vmap over autograd.grad. Neither has a rule for these operators."""
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and (vmaps.is_legacy_batchedtensor(g) or _of_this_vmap(g)) for g in grads)


def _of_this_vmap(g: Tensor) -> bool:
    return vmaps.is_batchedtensor(g) and vmaps.maybe_get_level(g) == vmaps.maybe_current_level()


def _one_by_one(gradients, grads) -> list:
    """gradients(*grads) for each of a batch of `grads`, as a batch."""
    if any(g is not None and vmaps.is_legacy_batchedtensor(g) for g in grads):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        batch = torch._add_batch_dim
        each = [torch._remove_batch_dim(g, level, -1, 0) if _batched((g,)) else None for g in grads]
    else:
        level, batch = vmaps.maybe_current_level(), vmaps._add_batch_dim
        each = [None if g is None or not _of_this_vmap(g) else vmaps._unwrap_batched(g, level) for g in grads]
        each = [None if pair is None else pair[0].movedim(pair[1], 0) for pair in each]
    rows = zip(*(itertools.repeat(g) if e is None else e.unbind() for g, e in zip(grads, each)))
    results = zip(*(gradients(*row) for row in rows))
    return [None if r[0] is None else batch(torch.stack(r), 0, level) for r in results]


def _watched(results, needs):
    """What a watcher receives: the sums, and the gradients of h0 and c0 where they are needed."""
    return results[-1], results[1] if needs[1] else None, results[2] if needs[2] else None


class _Step(torch.autograd.Function):
    """One step of a cell: input (B, I), states (B, ...)."""

    @staticmethod
    def forward(ctx, cell, precision, slots, watcher, *tensors):
        input, h0, c0, *weights = tensors if slots is None else _spread(tensors, slots)
        h, c, tape = ops.step(cell, input, h0, c0, weights, True, precision)
        ctx.save_for_backward(tape, *tensors)
        ctx.set_materialize_grads(False)
        ctx.arguments = (cell, precision, slots)
        ctx.watcher = watcher
        return (h, c) if cell == "lstm" else h

    @staticmethod
    def backward(ctx, d_h, d_c=None):
        cell, precision, slots = ctx.arguments
        tape, *tensors = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[4:])
        spread, needs = (tensors, needed) if slots is None else (_spread(tensors, slots), _spread(needed, slots))
        results = _gradients_of_step(cell, precision, tape, spread, needs, d_h, d_c, ctx.watcher)
        if slots is not None:
            results = _gather(results, slots, len(tensors))
        return (None, None, None, None, *results)


def _gradients_of_step(cell, precision, tape, spread, needs, d_h, d_c, watcher=None):
    """From the gradients of h and c those of the tensors `spread`, None where they are not needed."""
    if _batched((d_h, d_c)):
        return _one_by_one(lambda *g: _gradients_of_step(cell, precision, tape, spread, needs, *g), (d_h, d_c))
    needs = [bool(n) and t is not None for n, t in zip(needs, spread)]

    def kernels(needs, watch=False):
        input, h0, c0, *weights = spread
        states = (None, d_h, d_c, None, None)
        return ops.layer_backward(
            cell, input, h0, c0, weights, None, None, None, tape, *states, False, False, needs, precision,
            *((None, None, 1) if watch else ()),
        )  # fmt: skip

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if watcher is not None:
            with torch.no_grad():
                watcher.receive(*_watched(kernels([*needs[:3], *[False] * (len(needs) - 3)], True), needs))
        lifted_d_h, lifted_d_c = None if d_h is None else d_h[None], None if d_c is None else d_c[None]
        arguments, grads = (None, None, None, False, False), (None, lifted_d_h, lifted_d_c, None, None)
        lifted = [*(None if t is None else t[None] for t in spread[:3]), *spread[3:]]
        results = _differentiable(cell, 1, lifted, arguments, needs, grads)
        return [*(None if r is None else r.squeeze(0) for r in results[:3]), *results[3:]]
    results = kernels(needs) if watcher is None else kernels(needs, True)
    if watcher is not None:
        watcher.receive(*_watched(results, needs))
    return [r if n else None for r, n in zip(results, needs)]


class _Recorded(torch.autograd.Function):
    """Layers, or one step of a cell, that direct.py has computed already, in its caller's layout."""

    @staticmethod
    def forward(ctx, cell, layout, results, tape, between, precision, *tensors):
        ctx.save_for_backward(tape, between, *tensors)
        ctx.set_materialize_grads(False)
        ctx.arguments = (cell, layout, precision)
        return results

    @staticmethod
    def backward(ctx, *grads):
        cell, layout, precision = ctx.arguments
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _C.backward(cell, *layout, precision, saved, needs, grads)
            if found is not None:
                return found
        num_layers, layered, bidirectional, batch_first = layout
        (tape, between, *tensors), needs = saved, needs[6:]
        if not layered:
            results = _gradients_of_step(cell, precision, tape, tensors, needs, *(*grads, None)[:2])
        else:
            d_output, d_h, d_c = (*grads, None)[:3]
            if batch_first:
                tensors[0] = tensors[0].transpose(0, 1)
                d_output = None if d_output is None else d_output.transpose(0, 1)
            tapes = [tape] if num_layers == 1 else [*tape.chunk(num_layers), *between]
            arguments = (cell, num_layers, bidirectional, batch_first, False, precision, False, False)
            incoming = (d_output, d_h, d_c, None, None)
            results = _gradients_of_layers(arguments, tensors, needs, tapes, (None, None, None), incoming)
            if batch_first and results[0] is not None:
                results[0] = results[0].transpose(0, 1)
        return (None,) * 6 + tuple(results)


# _Recorded.apply(cell, layout, *what _C.recorded returned, with its tensors one by one): the results, to be
# differentiated. layout: the number of layers; whether it is a module's call, which has an output; bidirectional;
# batch_first. Without the steps that torch's own takes in Python for function transforms, of which none is active where
# direct.py computes.
record = super(torch.autograd.Function, _Recorded).apply


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


def _differentiable(cell, num_layers, tensors, arguments, needs, grads, resets=False):
    """The gradients as a differentiable function of the saved tensors and of the incoming gradients."""
    # A fresh alias for each argument, because an argument may be used twice, or be computed from another one, and its
    # gradient here is that of its own place alone.
    alias = [None if t is None else t.view_as(t) for t in tensors]
    weights, starts = (alias[3:-2], alias[-2:]) if resets else (alias[3:], ())
    with torch.autocast(tensors[0].device.type, enabled=False):
        outputs = reference.layers(cell, num_layers, *alias[:3], weights, *arguments, *starts, layer=_layer)
        pairs = [(o, g) for o, g in zip(outputs, grads) if o is not None and g is not None and o.requires_grad]
        wanted = [a for a, n in zip(alias, needs) if n]
        found = iter(())
        if pairs and wanted:
            outputs, grads = zip(*pairs)
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found, None) if n else None for n in needs]


def _layer(cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, all_states, *starts):
    return transforms.layer(
        cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, False, all_states, *starts
    )


def layers(
    cell: str,
    num_layers: int,
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
    precision: int,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    chunked: bool = False,
    watcher=None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`ops.layer`, or `ops.stack` where there are several, differentiable; all_states for one layer alone.

    chunked: keep little for backward (recompute.py); several layers of one direction alone. watcher: a
    recording.Watcher, to be told of each step of backward.

    Returns output, h_n, c_n, h_all, c_all; None for what the cell or call has not.
    """
    lstm = cell == "lstm"
    starts = () if h_reset is None else (h_reset, c_reset)
    if not needed(input, h0, c0, weights, *starts):
        given = (cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major)
        if num_layers > 1:
            output, h_n, c_n, _ = ops.stack(*given, num_layers, num_layers, precision, *starts)
            return output, h_n, c_n if lstm else None, None, None
        output, h_n, c_n, h_all, c_all, _ = ops.layer(*given, all_states, False, precision, *starts)
        return (
            output,
            h_n,
            c_n if lstm else None,
            h_all if all_states else None,
            c_all if lstm and all_states else None,
        )
    saved_from = _first_needed((input, h0, c0, *starts), weights, num_layers) if num_layers > 1 else 0
    arguments = (bidirectional, batch_major, all_states, precision, h_reset is not None, chunked)
    tensors, slots = (input, h0, c0, *weights, *starts), None
    if torch.compiler.is_compiling():  # Dynamo refuses a Function that is given one tensor twice; eager does not mind
        tensors, slots = _unique(tensors)
    found = _Layers.apply(
        cell, num_layers, saved_from, *arguments, slots, watcher, batch_sizes, lengths, reset, *tensors
    )
    if lstm:
        return found if all_states else (*found, None, None)
    output, h_n, *h_all = found
    return output, h_n, None, h_all[0] if all_states else None, None


def _first_needed(others, weights, num_layers: int) -> int:
    """The first layer that a gradient is wanted of; those below save nothing for backward."""
    if any(t is not None and t.requires_grad for t in others):
        return 0
    per = len(weights) // num_layers
    return next(k for k, w in enumerate(weights) if w.requires_grad) // per


def step(
    cell: str, input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], precision: int, watcher=None
) -> tuple[Tensor, Tensor | None]:
    """`ops.step`, differentiable: input (B, I), states (B, ...). Returns h, c; None for the c of a cell without one."""
    if not needed(input, h0, c0, weights):
        h, c, _ = ops.step(cell, input, h0, c0, weights, False, precision)
        return h, c if cell == "lstm" else None
    tensors, slots = (input, h0, c0, *weights), None
    if torch.compiler.is_compiling():
        tensors, slots = _unique(tensors)
    found = _Step.apply(cell, precision, slots, watcher, *tensors)
    return found if cell == "lstm" else (found, None)


def needed(input, h0, c0, weights, h_reset=None, c_reset=None) -> bool:
    """Whether a call has to be recorded for backward. Export keeps no Function's backward, and so needs no tape."""
    if not torch.is_grad_enabled() or _exporting():
        return False
    if input.requires_grad or (h0 is not None and h0.requires_grad) or (c0 is not None and c0.requires_grad):
        return True
    if h_reset is not None and (h_reset.requires_grad or (c_reset is not None and c_reset.requires_grad)):
        return True
    for w in weights:
        if w.requires_grad:
            return True
    return False


def _exporting() -> bool:
    return torch.compiler.is_exporting()


# Asked while a graph is captured, not traced: Dynamo before torch 2.13 takes is_exporting() for True in torch.compile
# too, and training would lose its gradients.
_exporting._dynamo_marked_constant = True
