"""recompute=True: layers that keep for backward the states at the ends of chunks of steps alone, and run chunks again.

Forward goes chunk by chunk and keeps the states that enter each, and the tape of the last. Backward goes through the
chunks from the last to the first: the forward pass of a chunk from its kept states, with a tape this time, then
back-propagation through it, whose gradients of the states go on to the chunk before. So there is never more than the
tape of a chunk, and the kept states are a small part of that (Gruslys et al. 2016, "Memory-Efficient Backpropagation
Through Time", with chunks of equal length).

Results are the same bits as without, but for the gradients of weights and reset states, which are added up in another
order. States between chunks are float32 when the storage is 16-bit, as they are inside the kernels.

A reverse direction is a forward direction over rows turned round, each within its length. Layers of one direction go
through a chunk together; those of two, one after the other (functional.py).

Two operators of their own, so that torch.compile sees one node whatever the length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrnn import fakes, ops, reference

# Steps of a chunk: as many as give so many rows, but not more than this part of the sequence, and not less than so
# many. Shorter ones make the operators' own costs and the packing of the weights dear, longer ones the tape. More than
# 16, so that no chunk has fewer than nine (_bound): steps times rows of at most eight may be summed in another order.
_ROWS, _PARTS, _FEWEST = 4096, 5, 18


def worthwhile(T) -> bool:
    """Whether there would be more than one chunk. Not asked of a graph that is to serve every length."""
    return torch.compiler.is_compiling() or T > _FEWEST


def _mark_count(T, B):
    """How many states are kept, for sizes that may be symbolic: one more than there are chunks, the last unused,
    because torch.compile makes another graph for a size that turns out to be 1."""
    steps = torch.sym_max(_FEWEST, torch.sym_min(T // _PARTS, _ROWS // torch.sym_max(B, 1)))
    return (T + steps - 1) // steps + 1


def _bound(k, count, T):
    """Where chunk k of `count` begins. They are of about the same length, so that none is much shorter: of few steps,
    another path of the kernels may take the sums in another order (csrc/cpu/pack.h, few_enough_for_dots)."""
    return k * T // count


class _OneWay:
    """Layers of one direction, chunk by chunk. Time is in the order that the direction goes through it."""

    def __init__(self, cell, num_layers, x, weights, lengths, reset, starts, precision):
        self.cell, self.layers, self.x, self.weights, self.precision = cell, num_layers, x, weights, precision
        self.lengths, self.reset, self.starts = lengths, reset, starts
        T, B = x.shape[:2]
        count = _mark_count(T, B) - 1
        self.bounds = [_bound(k, count, T) for k in range(count + 1)]

    def arguments(self, k: int, h: Tensor, c: Tensor | None) -> tuple:
        begin, end = self.bounds[k : k + 2]
        lengths = None if self.lengths is None else (self.lengths - begin).clamp_(0, end - begin)
        reset = None if self.reset is None else self.reset[begin:end]
        return self.cell, self.x[begin:end], h, c, self.weights, None, lengths, reset

    def run(self, k: int, h: Tensor, c: Tensor | None, save: bool, all_states: bool = False) -> tuple:
        """output, h, c, c_all and, as a list, what is saved, of one chunk."""
        arguments = (*self.arguments(k, h, c), False, False)
        if self.layers > 1:
            found = ops.stack(*arguments, self.layers, 0 if save else self.layers, self.precision, *self.starts)
            output, h, c_new, saved = found
            return output, h, c_new if c is not None else None, None, saved
        output, h, c_new, _, c_all, tape = ops.layer(*arguments, all_states, save, self.precision, *self.starts)
        return output, h, c_new if c is not None else None, c_all, [tape]

    def forward(self, h, c, output: Tensor, c_all: Tensor | None, h_marks: Tensor, c_marks: Tensor | None):
        """From the states h (L, B, P) and c, onto the others: output (T, B, P), c_all (T, B, H), and the states that
        enter each chunk, (chunks, L, B, P) and (chunks, L, B, H). Returns the last h and c, and what the last chunk
        saved."""
        last = len(self.bounds) - 2
        for k, (begin, end) in enumerate(zip(self.bounds, self.bounds[1:])):
            h_marks[k] = h
            if c is not None:
                c_marks[k] = c
            output[begin:end], h, c, states, saved = self.run(k, h, c, k == last, c_all is not None)
            if c_all is not None:
                c_all[begin:end] = states[0]
        return h, c, saved

    def backward(
        self, h_marks, c_marks, saved, d_output, d_h, d_c, d_h_all, d_c_all, d_input: Tensor | None, needs,
        watched: list | None = None,
    ) -> list:  # fmt: skip
        """d_h and d_c: of the last states; d_h_all and d_c_all (T, B, ...): of one layer's; d_input (T, B, I): to be
        written. needs: of h0, c0, weights and reset states, as the result. watched: gets a chunk's, the last first.
        """
        sums = None
        for k in reversed(range(len(self.bounds) - 1)):
            begin, end = self.bounds[k : k + 2]
            h, c = h_marks[k], None if c_marks is None else c_marks[k]
            if sums is not None:
                saved = self.run(k, h, c, True)[-1]

            def part(t, begin=begin, end=end):
                return None if t is None else t[begin:end]

            carried = (True, c is not None) if k else needs[:2]
            wanted = [d_input is not None, *carried, *needs[2:]]
            arguments, last = self.arguments(k, h, c), (wanted, self.precision, *self.starts)
            if watched is not None:
                goes_on = sums is not None  # the chunk after this one was worked on
                last = (wanted, self.precision, *(self.starts or (None, None)), 2 if goes_on else 1)
            if self.layers > 1:
                found = ops.stack_backward(
                    *arguments, saved, part(d_output), d_h, d_c, False, False, self.layers, *last
                )
            else:
                states = (None if t is None else t[begin:end].unsqueeze(0) for t in (d_h_all, d_c_all))
                found = ops.layer_backward(*arguments, *saved, part(d_output), d_h, d_c, *states, False, False, *last)
            if watched is not None:
                watched.append(found.pop())
            if d_input is not None:
                d_input[begin:end] = found[0]
            d_h, d_c = found[1], found[2] if c is not None else None
            if sums is None:
                sums = found[3:]
            else:
                torch._foreach_add_(sums, found[3:])  # what is not wanted is empty
        return [d_h, d_c, *sums]


def _check(cell, input, states, weights, batch_sizes, lengths, reset, num_layers, D) -> None:
    """What the operators do not see, because they get chunks of it."""
    if cell not in ops.CELLS:
        raise RuntimeError(f"cell: expected one of {', '.join(map(repr, ops.CELLS))}, got {cell!r}")
    if num_layers < 1 or len(weights) < 2 * num_layers:
        raise RuntimeError(f"weights: expected at least two for each of {num_layers} layer(s), got {len(weights)}")
    if input.dim() != (3 if batch_sizes is None else 2) or not input.size(0):
        expected = "(T, B, input_size), T >= 1" if batch_sizes is None else "(N, input_size)"
        raise RuntimeError(f"input: expected shape {expected}, got {tuple(input.shape)}")
    T, B = (batch_sizes.size(0), int(batch_sizes[0])) if batch_sizes is not None else input.shape[:2]
    H, P = weights[1].size(0) // ops.CELLS[cell]["gates"], weights[1].size(-1)
    for name, state in states.items():
        if state is None:
            continue
        if name[0] == "c" and not ops.CELLS[cell]["has_c"]:
            raise RuntimeError(f"{name}: expected None for cell {cell!r}, got a tensor")
        if state.dtype != input.dtype:
            raise RuntimeError(f"{name}: expected dtype {input.dtype} as input's, got {state.dtype}")
        expected = (num_layers * D, B, P if name[0] == "h" else H)
        if tuple(state.shape) != expected:
            raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(state.shape)}")
    if reset is not None and tuple(reset.shape) != (T, B):
        raise RuntimeError(f"reset: expected shape (T, B) = ({T}, {B}), got {tuple(reset.shape)}")
    if lengths is not None and lengths.is_cpu and lengths.numel():  # nobody waits for a GPU's
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise RuntimeError(f"lengths: expected values from 0 to T = {T}, got {low if low < 0 else high}")


class _Call:
    """A layer, or layers of one direction: the arguments of the operators, as sequences (T, B, ...)."""

    def __init__(
        self, cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, num_layers, precision, h_reset,
        c_reset,
    ):  # fmt: skip
        self.D = 2 if bidirectional else 1
        states = {"h0": h0, "c0": c0, "h_reset": h_reset, "c_reset": c_reset}
        _check(cell, input, states, weights, batch_sizes, lengths, reset, num_layers, self.D)
        self.cell, self.num_layers, self.precision = cell, num_layers, precision
        self.dtype, self.rows = input.dtype, None
        self.wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        if batch_sizes is not None:
            input, self.rows, lengths = reference.unpack(input, batch_sizes)
            lengths = lengths.to(input.device)
        elif lengths is not None and not lengths.is_cpu:
            lengths = lengths.clamp(0, input.size(0))
        self.x, self.weights, self.lengths, self.reset = input, weights, lengths, reset
        self.T, self.B = input.shape[:2]
        self.H, self.P = weights[1].size(0) // ops.CELLS[cell]["gates"], weights[1].size(1)
        self.h0, self.c0, self.h_reset, self.c_reset = (
            None if t is None else t.to(self.wide) for t in (h0, c0, h_reset, c_reset)
        )
        self.turn = None
        if bidirectional and lengths is not None:
            steps = torch.arange(self.T, device=input.device).unsqueeze(1)
            rows = torch.arange(self.B, device=input.device)
            self.turn = torch.where(steps < lengths, lengths - 1 - steps, steps), rows

    def padded(self, t: Tensor | None) -> Tensor | None:
        """Packed rows as (T, B, ...)."""
        if t is None or self.rows is None:
            return t
        flat = t.new_zeros(self.T * self.B, t.size(1)).index_copy(0, self.rows, t)
        return flat.reshape(self.T, self.B, t.size(1))

    def packed(self, t: Tensor) -> Tensor:
        return t if self.rows is None else t.flatten(0, 1).index_select(0, self.rows)

    def turned(self, t: Tensor | None, d: int) -> Tensor | None:
        """(T, B, ...) in the order that direction d goes through it, and back; each row within its length."""
        if t is None or d == 0:
            return t
        return t.flip(0) if self.turn is None else t[self.turn]

    def turned_reset(self, d: int) -> Tensor | None:
        """What lies between two steps does so in either order; nothing lies before the first step of the reverse."""
        if self.reset is None or d == 0:
            return self.reset
        after = torch.cat([self.reset[1:], torch.zeros_like(self.reset[:1])])
        if self.lengths is not None:
            after &= torch.arange(1, self.T + 1, device=after.device).unsqueeze(1) < self.lengths
        return self.turned(after, 1)

    def direction(self, d: int) -> _OneWay:
        per = len(self.weights) // self.D
        starts = tuple(self.of(t, d) for t in (self.h_reset, self.c_reset)) if self.h_reset is not None else ()
        return _OneWay(
            self.cell, self.num_layers, self.turned(self.x, d), self.weights[d * per : (d + 1) * per], self.lengths,
            self.turned_reset(d), starts, self.precision,
        )  # fmt: skip

    def of(self, t: Tensor | None, d: int) -> Tensor | None:
        """The layers' part of direction d in a state (L*D, B, width)."""
        return t if t is None or self.D == 1 else t[d : d + 1]

    def columns(self, t: Tensor | None, d: int) -> Tensor | None:
        """Those of direction d in (T, B, D*P)."""
        return None if t is None else t[..., d * self.P : (d + 1) * self.P]

    def state(self, width: int) -> Tensor:
        return self.x.new_zeros(self.num_layers, self.B, width, dtype=self.wide)


_SCHEMA = (
    "str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, "
    "Tensor? reset, bool bidirectional, int num_layers, int precision, Tensor? h_reset, Tensor? c_reset, "
)
torch.library.define(
    "fastrnn::recomputed",
    f"({_SCHEMA}bool batch_major, bool all_states) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor h_all, "
    "Tensor c_all, Tensor h_marks, Tensor c_marks, Tensor[] saved)",
)
torch.library.define(
    "fastrnn::recomputed_backward",
    f"({_SCHEMA}Tensor h_marks, Tensor c_marks, Tensor[] saved, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, "
    "Tensor? d_h_all, Tensor? d_c_all, bool batch_major, bool[] needs, int watch=0) -> Tensor[]",
)
forward = torch.ops.fastrnn.recomputed.default
backward = torch.ops.fastrnn.recomputed_backward.default
_DEVICES = ("cpu", "cuda")


@torch.library.impl("fastrnn::recomputed", _DEVICES)
def _forward(*arguments):
    *arguments, batch_major, all_states = arguments
    call = _Call(*arguments)
    T, B, D, P, x = call.T, call.B, call.D, call.P, call.x
    lstm, L = call.cell == "lstm", call.num_layers * D
    output = fakes.empty_rows(x, T, B, D * P, batch_major)
    c_all = x.new_empty(D, T, B, call.H) if all_states and lstm else None
    count = _mark_count(T, B)
    h_marks = x.new_empty(count, L, B, P, dtype=call.wide)
    c_marks = x.new_empty(count, L, B, call.H, dtype=call.wide) if lstm else None
    last = []
    for d in range(D):
        h0, c0 = call.of(call.h0, d), call.of(call.c0, d)
        h = call.state(P) if h0 is None else h0
        c = None if not lstm else call.state(call.H) if c0 is None else c0
        part = slice(None) if D == 1 else slice(d, d + 1)
        to, states = call.columns(output, d), None if c_all is None else c_all[d]
        if d:
            to, states = torch.empty_like(to), None if states is None else torch.empty_like(states)
        marks = h_marks[:, part], None if c_marks is None else c_marks[:, part]
        last.append(call.direction(d).forward(h, c, to, states, *marks))
        if d:
            call.columns(output, d).copy_(call.turned(to, d))
            if states is not None:
                c_all[d] = call.turned(states, d)
    h, c, saved = zip(*last)
    h_n, c_n = (None if parts[0] is None else torch.cat(parts).to(call.dtype) for parts in (h, c))
    h_all = torch.stack([call.columns(output, d) for d in range(D)]) if all_states else None
    results = [call.packed(output), h_n, c_n, h_all, c_all]
    c_marks = x.new_empty(0, dtype=call.wide) if c_marks is None else c_marks
    return (*(x.new_empty(0) if t is None else t for t in results), h_marks, c_marks, sum(saved, []))


@torch.library.impl("fastrnn::recomputed_backward", _DEVICES)
def _backward(*arguments):
    if not isinstance(arguments[-1], int):
        arguments = (*arguments, 0)  # a default, which the dispatcher leaves out
    *arguments, h_marks, c_marks, saved, d_output, d_h_n, d_c_n, d_h_all, d_c_all, batch_major, needs, watch = arguments
    call = _Call(*arguments)
    x, D, lstm = call.x, call.D, call.cell == "lstm"
    per, resets = len(call.weights) // D, call.h_reset is not None
    d_output = call.padded(d_output)
    d_h_n, d_c_n = (None if t is None else t.to(call.wide) for t in (d_h_n, d_c_n))
    d_input = None
    if needs[0]:  # two directions add up in float32 before they are rounded
        like = x if D == 1 else x.new_empty(0, dtype=call.wide)
        d_input = fakes.empty_rows(like, call.T, call.B, x.size(2), batch_major and call.rows is None)
    found, watched = [], []
    for d in range(D):
        part = slice(None) if D == 1 else slice(d, d + 1)
        chunks = [] if watch else None
        to = d_input if d == 0 or d_input is None else torch.empty_like(d_input)
        of_all = (None if t is None else call.turned(t[d], d) for t in (d_h_all, d_c_all))
        found.append(
            call.direction(d).backward(
                h_marks[:, part], c_marks[:, part] if lstm else None, saved if D == 1 else saved[d : d + 1],
                call.turned(call.columns(d_output, d), d),
                call.of(d_h_n, d), call.of(d_c_n, d), *of_all, to,
                [*needs[1:3], *needs[3 + d * per : 3 + (d + 1) * per], *(needs[-2:] if resets else ())], chunks,
            )
        )  # fmt: skip
        if watch:
            sums = torch.cat(chunks[::-1], 1)
            watched.append(sums.flip(1) if d else sums)
        if d and d_input is not None:
            d_input += call.turned(to, d)
    # of both directions: states side by side, weights one after the other
    weights = [g for parts in found for g in parts[2 : 2 + per]]
    states = [torch.cat(parts) if n else None for n, parts in zip(needs[1:3], zip(*(p[:2] for p in found)))]
    if resets:
        reset_states = [torch.cat(parts) if n else None for n, parts in zip(needs[-2:], zip(*(p[-2:] for p in found)))]
    results = [None if d_input is None else call.packed(d_input), *states, *weights, *(reset_states if resets else ())]
    results = [g.to(call.dtype) if n else x.new_empty(0) for g, n in zip(results, needs)]
    return results + ([torch.cat(watched)] if watch else [])


@torch.library.register_fake("fastrnn::recomputed")
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, num_layers, precision, h_reset, c_reset,
    batch_major, all_states,
):  # fmt: skip
    D = 2 if bidirectional else 1
    T, B, _, H, P, projection = fakes.sizes(cell, input, weights, D, num_layers, batch_sizes, h0, c0, reset)
    L, lstm, wide = num_layers * D, cell == "lstm", torch.float64 if input.dtype == torch.float64 else torch.float32
    output = input.new_empty(input.size(0), D * P)
    if batch_sizes is None:
        output = fakes.empty_rows(input, T, B, D * P, batch_major)
    count = _mark_count(T, B)
    last = T - _bound(count - 2, count - 1, T)
    saved = [fakes.tape(cell, input, (1, last * B), H, P, projection, True) for _ in range(L)]
    saved += [input.new_empty(last, B, P) for _ in range(1, num_layers)]
    return (
        output,
        input.new_empty(L, B, P),
        input.new_empty(L, B, H) if lstm else input.new_empty(0),
        input.new_empty(D, T, B, P) if all_states else input.new_empty(0),
        input.new_empty(D, T, B, H) if all_states and lstm else input.new_empty(0),
        input.new_empty(count, L, B, P, dtype=wide),
        input.new_empty(count, L, B, H, dtype=wide) if lstm else input.new_empty(0, dtype=wide),
        saved,
    )


@torch.library.register_fake("fastrnn::recomputed_backward")
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, num_layers, precision, h_reset, c_reset,
    h_marks, c_marks, saved, d_output, d_h_n, d_c_n, d_h_all, d_c_all, batch_major, needs, watch=0,
):  # fmt: skip
    L, T = num_layers * (2 if bidirectional else 1), input.size(0) if batch_sizes is None else batch_sizes.size(0)
    found = fakes.gradients(input, batch_major, needs, h0, c0, weights, h_reset, c_reset)
    return found + fakes.watched(cell, input, L, T, watch)


@register_flop_formula(torch.ops.fastrnn.recomputed)
def _(cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, num_layers, *_, **__) -> int:
    return fakes.forward_flops(cell, input, weights, bidirectional, num_layers)


@register_flop_formula(torch.ops.fastrnn.recomputed_backward)
def _(cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, num_layers, *rest, **_) -> int:
    forward = fakes.forward_flops(cell, input, weights, bidirectional, num_layers)
    return forward + fakes.backward_flops(cell, input, weights, bidirectional, rest[12], num_layers)
