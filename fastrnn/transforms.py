"""One layer under torch.func's vmap and grad: autograd.Functions that say how they are batched and differentiated.

vmap folds what is mapped into the batch, so that one call serves all samples: row b of sample n becomes row b * N + n
(in that order the rows of a PackedSequence stay sorted). Mapped weights are a call each. Gradients of weights that are
wanted sample by sample come from one back-propagation for all samples and a product each (`ops.layer_operands`).

A plain backward through gradients, torch.func.grad's or those of create_graph (autograd.py), is double_backward.py's,
and one through that is reference.py's. Forward mode and gradients of gradients by torch.func never come here (plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrnn import ops, reference
from fastrnn.double_backward import double_backward


@dataclass(frozen=True)
class Options:
    """What of a call is no tensor. No tuple, which vmap would take for several arguments."""

    cell: str
    bidirectional: bool
    batch_major: bool
    all_states: bool
    save: bool
    resets: bool = False  # the last two tensors are h_reset and c_reset
    needs: tuple[bool, ...] = ()  # of all tensors, input, h0, c0, the weights, ...: which gradients are

    def split(self, tensors) -> tuple[list, list]:
        """Tensors, or what is said of each, as those before the reset states, and these."""
        count = len(tensors) - 2 if self.resets else len(tensors)
        return list(tensors[:count]), list(tensors[count:])


def layer(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, all_states, h_reset=None,
    c_reset=None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`ops.layer`, and None for what the cell or call has not."""
    options = Options(cell, bidirectional, batch_major, all_states, torch.is_grad_enabled(), h_reset is not None)
    starts = (h_reset, c_reset) if options.resets else ()
    output, h_n, c_n, h_all, c_all, _tape = _Layer.apply(
        options, batch_sizes, lengths, reset, input, h0, c0, *weights, *starts
    )
    lstm = cell == "lstm"
    return output, h_n, c_n if lstm else None, h_all if all_states else None, c_all if lstm and all_states else None


class _Layer(torch.autograd.Function):
    """(options, batch_sizes, lengths, reset, input, h0, c0, *weights, and where there are some h_reset and c_reset) ->
    output, h_n, c_n, h_all, c_all, tape."""

    @staticmethod
    def forward(options, batch_sizes, lengths, reset, *tensors):
        (input, h0, c0, *weights), starts = options.split(tensors)
        # A ragged tape is no tensor of samples, nor is the tape of another layout: backward makes it anew.
        save = options.save and batch_sizes is None and lengths is None
        *found, tape = ops.layer(
            options.cell, input, h0, c0, weights, batch_sizes, lengths, reset, options.bidirectional,
            options.batch_major, options.all_states, save, ops.EXACT, *starts,
        )  # fmt: skip
        if save:
            steps, rows = input.shape[:2]
            tape = tape.unflatten(1, (rows, steps) if _tape_rows(input) == 1 else (steps, rows))
        return (*found, tape)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        options, batch_sizes, lengths, reset, *tensors = inputs
        tape = outputs[-1]
        ctx.mark_non_differentiable(tape)
        ctx.save_for_backward(batch_sizes, lengths, reset, tape, *tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        batch_sizes, lengths, reset, tape, *tensors = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[4:])
        lstm, all_states = ctx.options.cell == "lstm", ctx.options.all_states
        kept = (True, True, lstm, all_states, lstm and all_states)
        incoming = [g if keep else None for g, keep in zip(grads, kept)]
        found = iter(())
        if any(needs) and any(g is not None for g in incoming):
            options = replace(ctx.options, needs=needs)
            found = iter(_Gradients.apply(options, batch_sizes, lengths, reset, tape, *incoming, *tensors))
        return (None,) * 4 + tuple(next(found, None) if n else None for n in needs)

    @staticmethod
    def vmap(info, in_dims, options, batch_sizes, lengths, reset, *tensors):
        (input, h0, c0, *weights), starts = options.split(tensors)
        dims, dims_of_starts = options.split(in_dims[4:])
        if in_dims[1] is not None or any(d is not None for d in dims[3:]):
            return _one_by_one(_Layer, info, in_dims, options, batch_sizes, lengths, reset, *tensors)
        fold = _Fold(info.batch_size, batch_sizes is not None)
        sequence, states = fold.sequence, fold.states
        results = _Layer.apply(
            options,
            fold.sizes(batch_sizes),
            fold.rows(lengths, in_dims[2], 0),
            fold.rows(reset, in_dims[3], 1),
            sequence(input, dims[0]),
            states(h0, dims[1]),
            states(c0, dims[2]),
            *weights,
            *(states(t, d) for t, d in zip(starts, dims_of_starts)),
        )
        return fold.unfold(results, (fold.place, 1, 1, 2, 2, _tape_rows(input)))


class _Gradients(torch.autograd.Function):
    """(options, batch_sizes, lengths, reset, tape, d_output, d_h_n, d_c_n, d_h_all, d_c_all, and the tensors of _Layer)
    -> the gradients that are needed."""

    @staticmethod
    def forward(options, batch_sizes, lengths, reset, tape, d_output, d_h_n, d_c_n, d_h_all, d_c_all, *tensors):
        incoming = (d_output, d_h_n, d_c_n, d_h_all, d_c_all)
        given, starts = _given(options, batch_sizes, lengths, reset, tape, *tensors)
        found = ops.layer_backward(
            *given, *incoming, options.bidirectional, options.batch_major, list(options.needs), ops.EXACT, *starts
        )
        return tuple(g for g, n in zip(found, options.needs) if n)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        options, batch_sizes, lengths, reset, _tape, *tensors = inputs
        ctx.save_for_backward(batch_sizes, lengths, reset, *tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        options = ctx.options
        batch_sizes, lengths, reset, *given = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        if not any(wanted) or all(g is None for g in grads):
            return (None,) * (5 + len(wanted))
        ragged = (batch_sizes, lengths, reset)
        with torch.autocast(given[5].device.type, enabled=False):
            if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
                found = _third(options, ragged, given, wanted, grads)
            else:
                grads = iter(grads)
                cotangents = [next(grads) if n else None for n in options.needs]
                tensors, starts = options.split(given[5:])
                by_incoming, by_tensor = double_backward(
                    options.cell, options.bidirectional, *ragged, given[:5], tensors, cotangents, *starts
                )
                found = [g if n else None for g, n in zip([*by_incoming, *by_tensor], wanted)]
        return (None,) * 5 + tuple(found)

    @staticmethod
    def vmap(info, in_dims, options, batch_sizes, lengths, reset, tape, *tensors):
        incoming, ((input, h0, c0, *weights), starts) = tensors[:5], options.split(tensors[5:])
        needs, needs_of_starts = options.split(options.needs)
        dims, dims_of_starts = options.split(in_dims[5:])
        # What has to be differentiable goes by the Function that is.
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if in_dims[1] is not None or any(d is not None for d in dims[8:]) or (recorded and any(needs[3:])):
            return _one_by_one(_Gradients, info, in_dims, options, batch_sizes, lengths, reset, tape, *tensors)
        fold = _Fold(info.batch_size, batch_sizes is not None)
        sequence, states, rows = fold.sequence, fold.states, fold.rows
        folded = (
            fold.sizes(batch_sizes),
            rows(lengths, in_dims[2], 0),
            rows(reset, in_dims[3], 1),
            rows(tape, in_dims[4], _tape_rows(input)) if tape.numel() else tape.new_empty(0),
            sequence(incoming[0], dims[0]),
            states(incoming[1], dims[1]),
            states(incoming[2], dims[2]),
            rows(incoming[3], dims[3], 2),
            rows(incoming[4], dims[4], 2),
            sequence(input, dims[5]),
            states(h0, dims[6]),
            states(c0, dims[7]),
            *weights,
            *(states(t, d) for t, d in zip(starts, dims_of_starts)),
        )
        places = [place for place, n in zip((fold.place, 1, 1), needs) if n]
        after = [1] * sum(needs_of_starts)
        if not any(needs[3:]):
            return fold.unfold(_Gradients.apply(options, *folded), places + after)
        found = _Operands.apply(options, *folded)
        count, end = len(places), len(places) + len(after)
        gradients, dims = fold.unfold(found[:end], places + after)
        x = folded[9]
        of_weights = tuple(
            gradient.to(weights[i].dtype)
            for i, gradient in _products(options, needs[3:], info.batch_size, x, found[end:])
        )
        return (
            gradients[:count] + of_weights + gradients[count:],
            dims[:count] + (0,) * len(of_weights) + dims[count:],
        )


class _Operands(torch.autograd.Function):
    """The arguments of _Gradients -> the gradients of input, h0, c0 and reset states that are needed, and
    `ops.layer_operands`' operands of those of the weights. Not differentiable: _Gradients asks for it where nothing
    records."""

    @staticmethod
    def forward(options, batch_sizes, lengths, reset, tape, d_output, d_h_n, d_c_n, d_h_all, d_c_all, *tensors):
        incoming = (d_output, d_h_n, d_c_n, d_h_all, d_c_all)
        given, starts = _given(options, batch_sizes, lengths, reset, tape, *tensors)
        needs, needs_of_starts = options.split(options.needs)
        needs = [*needs[:3], *needs_of_starts]
        found = ops.layer_operands(*given, *incoming, options.bidirectional, options.batch_major, needs, *starts)
        return (*(g for g, n in zip(found, needs) if n), *found[len(needs) :])

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _one_by_one(_Operands, info, in_dims, *arguments)


def _tape_rows(input: Tensor) -> int:
    """Where the rows are in a tape: (D, rows, steps, width) on the CPU, (D, steps, rows, width) on a GPU."""
    return 1 if input.is_cpu else 2


def _given(options, batch_sizes, lengths, reset, tape, *tensors):
    """What the backward operators begin with, with the tape, which is made anew where there is none; and the reset
    states."""
    (input, h0, c0, *weights), starts = options.split(tensors)
    arguments = (options.cell, input, h0, c0, weights, batch_sizes, lengths, reset)
    if tape.numel():
        tape = tape.flatten(1, 2)
    else:
        directions = (options.bidirectional, options.batch_major)
        *_, tape = ops.layer(*arguments, *directions, False, True, ops.EXACT, *starts)
    return (*arguments, tape), starts


def _third(options, ragged, given, wanted, grads):
    """What _Gradients.backward returns, in operations that can be differentiated again."""
    places = [i for i, n in enumerate(wanted) if n]
    received = [i for i, g in enumerate(grads) if g is not None]

    def gradients(*variables):
        tensors = list(given)
        for place, variable in zip(places, variables):
            tensors[place] = variable
        results = _by_reference(options, *ragged, tensors[:5], tensors[5:])
        return tuple(results[i] for i in received)

    _, pull = torch.func.vjp(gradients, *(given[i] for i in places))
    found = iter(pull(tuple(grads[i] for i in received)))
    return [next(found) if n else None for n in wanted]


def _by_reference(options, batch_sizes, lengths, reset, incoming, tensors):
    """The gradients that are needed, in operations that can be differentiated again."""
    places = [i for i, n in enumerate(options.needs) if n]
    received = [i for i, g in enumerate(incoming) if g is not None]

    def forward(*variables):
        values = list(tensors)
        for place, variable in zip(places, variables):
            values[place] = variable
        (x, h0, c0, *weights), starts = options.split(values)
        found = reference.layer(
            options.cell, x, h0, c0, weights, batch_sizes, lengths, reset, options.bidirectional, options.all_states,
            *starts,
        )  # fmt: skip
        return tuple(found[i] for i in received)

    _, pull = torch.func.vjp(forward, *(tensors[i] for i in places))
    return pull(tuple(incoming[i] for i in received))


class _Fold:
    """N samples as one batch. `place` is where the rows are in a sequence, (T, B, ...) or packed (rows, ...)."""

    def __init__(self, samples: int, packed: bool):
        self.samples, self.place = samples, 0 if packed else 1

    def rows(self, t: Tensor | None, dim: int | None, place: int) -> Tensor | None:
        """t with its rows at `place`, and samples at `dim` or the same for all, as rows of all samples."""
        if t is None:
            return None
        if dim is None:
            t = t.unsqueeze(place + 1)
            t = t.expand(*t.shape[: place + 1], self.samples, *t.shape[place + 2 :])
        else:
            t = t.movedim(dim, place + 1)
        return t.flatten(place, place + 1)

    def sequence(self, t, dim):
        return self.rows(t, dim, self.place)

    def states(self, t, dim):
        return self.rows(t, dim, 1)

    def sizes(self, batch_sizes):
        return None if batch_sizes is None else batch_sizes * self.samples

    def unfold(self, results, places):
        """The results for each sample, and where the samples are; what is empty is no sample's."""
        dims = tuple(place + 1 if t.dim() > 1 else None for t, place in zip(results, places))
        return (
            tuple(
                t if dim is None else t.unflatten(dim - 1, (t.size(dim - 1) // self.samples, self.samples))
                for t, dim in zip(results, dims)
            ),
            dims,
        )


def _one_by_one(function, info, in_dims, *arguments):
    """A call for each sample."""
    results = [
        function.apply(*(a if d is None or a is None else a.select(d, i) for a, d in zip(arguments, in_dims)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results))
    return stacked, (0,) * len(stacked)


def _products(options, needs, samples, x, operands):
    """(i, gradient (N, ...)) of each weight i that is needed, from the operands of all samples' rows."""
    dgates, h_prev, *projection = operands
    D, H = dgates.size(0), dgates.size(-1) // ops.CELLS[options.cell]["slots"]
    per = len(needs) // D

    def by_sample(t):  # (steps and rows of one sample, N, columns)
        return t.reshape(-1, samples, t.size(-1))

    def sums(left, right):  # (N, columns of left, columns of right)
        return torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1))

    x = by_sample(x).to(dgates.dtype)
    for d in range(D):
        of_x, of_h = ops.by_gate(options.cell, by_sample(dgates[d]).unflatten(-1, (-1, H)))
        for i, role in enumerate(ops.roles(per), d * per):
            if not needs[i]:
                continue
            if role == "w_ih":
                yield i, sums(of_x, x)
            elif role == "w_hh":
                yield i, sums(of_h, by_sample(h_prev[d]))
            elif role == "w_hr":
                dh_out, h_raw = projection
                yield i, sums(by_sample(dh_out[d]), by_sample(h_raw[d]))
            else:
                yield i, (of_x if role == "b_ih" else of_h).sum(0)
