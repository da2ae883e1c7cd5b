"""What torch must know of the operators beside their kernels: the shapes and strides they return (fake kernels, for
torch.compile, export and meta tensors) and their floating-point operations (for torch.utils.flop_counter).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastrnn.ops import CELLS, watched_width


def empty_rows(like: Tensor, T, B, columns, batch_major: bool) -> Tensor:
    """An empty (T, B, columns), laid out as (B, T, columns) when batch_major."""
    if batch_major:
        return like.new_empty(B, T, columns).transpose(0, 1)
    return like.new_empty(T, B, columns)


def tape(cell: str, like: Tensor, rows: tuple, H: int, P: int, projection: bool, save: bool) -> Tensor:
    padded = [(n + 15) // 16 * 16 for n in (H, P)]  # problem.h: padded_to_tape_block
    width = CELLS[cell]["tape"] * padded[0] + (padded[1] if projection else 0)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty((*rows, width) if save else 0, dtype=dtype)


def sizes(cell: str, input, weights, D: int, layers: int, batch_sizes, *known) -> tuple:
    """T, B, stored rows N, H, P, and whether there is a projection."""
    P = weights[1].size(1)
    H = weights[1].size(0) // CELLS[cell]["gates"]
    projection = len(weights) // (D * layers) % 2 == 1
    if batch_sizes is None:
        T, B = input.size(0), input.size(1)
        return T, B, T * B, H, P, projection
    tensor = next((t for t in known if t is not None), None)
    B = tensor.size(1) if tensor is not None else batch_sizes[0].item()
    return batch_sizes.size(0), B, input.size(0), H, P, projection


@torch.library.register_fake("fastrnn::layer")
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, all_states, save,
    precision=0, h_reset=None, c_reset=None,
):  # fmt: skip
    D = 2 if bidirectional else 1
    T, B, N, H, P, projection = sizes(cell, input, weights, D, 1, batch_sizes, h0, c0, reset)
    output = empty_rows(input, T, B, D * P, batch_major) if batch_sizes is None else input.new_empty(N, D * P)
    none = input.new_empty
    has_c = CELLS[cell]["has_c"]
    state = input if h0 is None else h0  # of which dtype the states are
    return (
        output,
        state.new_empty(D, B, P),
        state.new_empty(D, B, H) if has_c else state.new_empty(0),
        input.new_empty(D, T, B, P) if all_states else none(0),
        input.new_empty(D, T, B, H) if all_states and has_c else none(0),
        tape(cell, input, (D, N), H, P, projection, save),
    )


@torch.library.register_fake("fastrnn::stack")
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, num_layers, saved_from,
    precision=0, h_reset=None, c_reset=None,
):  # fmt: skip
    D = 2 if bidirectional else 1
    T, B, N, H, P, projection = sizes(cell, input, weights, D, num_layers, batch_sizes, h0, c0, reset)

    def rows(batch_major):
        return empty_rows(input, T, B, D * P, batch_major) if batch_sizes is None else input.new_empty(N, D * P)

    state = input if h0 is None else h0
    c_n = state.new_empty(num_layers * D, B, H) if CELLS[cell]["has_c"] else state.new_empty(0)
    saved = [tape(cell, input, (D, N), H, P, projection, True) for _ in range(saved_from, num_layers)]
    saved += [rows(False) for _ in range(max(saved_from, 1), num_layers)]
    return rows(batch_major), state.new_empty(num_layers * D, B, P), c_n, saved


@torch.library.register_fake("fastrnn::step")
def _(cell, input, h0, c0, weights, save, precision=0):
    B, P, H = input.size(0), weights[1].size(1), weights[1].size(0) // CELLS[cell]["gates"]
    h, c = input.new_empty(B, P), input.new_empty(B, H) if CELLS[cell]["has_c"] else input.new_empty(0)
    return h, c, tape(cell, input, (1, B), H, P, len(weights) % 2 == 1, save)


@torch.library.register_fake("fastrnn::step_")
def _(h, c, cell, input, *args, **kwargs):
    return None


def gradients(input, batch_major, needs, h0, c0, weights, h_reset, c_reset) -> list[Tensor]:
    """Of a backward operator."""
    wide = input if h0 is None else h0  # of which dtype they are

    def gradient(needed, of):
        return wide.new_empty(of.shape) if needed else input.new_empty(0)

    others = (h0, c0, *weights, h_reset, c_reset)[: len(needs) - 1]
    if needs[0] and input.dim() == 3:
        d_input = empty_rows(wide, *input.shape, batch_major)
    else:
        d_input = gradient(needs[0], input)
    return [d_input, *(gradient(needed, of) for needed, of in zip(needs[1:], others, strict=True))]


def watched(cell, input, layers, T, watch: int) -> list[Tensor]:
    """What a backward operator returns after the gradients."""
    return [input.new_empty(layers, T, watched_width(cell), dtype=torch.float64)] if watch else []


def _steps(input, batch_sizes):
    if batch_sizes is not None:
        return batch_sizes.size(0)
    return input.size(0) if input.dim() == 3 else 1


@torch.library.register_fake("fastrnn::layer_backward")
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, tape, d_output, d_h_n, d_c_n, d_h_all, d_c_all,
    bidirectional, batch_major, needs, precision=0, h_reset=None, c_reset=None, watch=0,
):  # fmt: skip
    D, T = 2 if bidirectional else 1, _steps(input, batch_sizes)
    return gradients(input, batch_major, needs, h0, c0, weights, h_reset, c_reset) + watched(cell, input, D, T, watch)


@torch.library.register_fake("fastrnn::layer_operands")
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, tape, d_output, d_h_n, d_c_n, d_h_all, d_c_all,
    bidirectional, batch_major, needs, h_reset=None, c_reset=None,
):  # fmt: skip
    D = 2 if bidirectional else 1
    T, B, N, H, P, projection = sizes(cell, input, weights, D, 1, batch_sizes, h0, c0, reset)
    rows = (D, N) if batch_sizes is not None else (D, T, B)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    columns = (CELLS[cell]["slots"] * H, P, *((P, H) if projection else ()))
    found = gradients(input, batch_major, needs, h0, c0, [], h_reset, c_reset)
    return found + [input.new_empty(*rows, n, dtype=dtype) for n in columns]


@torch.library.register_fake("fastrnn::stack_backward")
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, saved, d_output, d_h_n, d_c_n, bidirectional,
    batch_major, num_layers, needs, precision=0, h_reset=None, c_reset=None, watch=0,
):  # fmt: skip
    L, T = num_layers * (2 if bidirectional else 1), _steps(input, batch_sizes)
    return gradients(input, batch_major, needs, h0, c0, weights, h_reset, c_reset) + watched(cell, input, L, T, watch)


def _products(cell: str, input, weights, bidirectional: bool) -> tuple[int, int, int]:
    """Multiplications and additions of input projection, recurrence and state projection, from shapes."""
    D = 2 if bidirectional else 1
    rows = 1
    for size in input[:-1]:
        rows *= size
    gates_h, P = weights[1]
    H = gates_h // CELLS[cell]["gates"]
    projection = len(weights) // D % 2 == 1
    return 2 * D * rows * gates_h * input[-1], 2 * D * rows * gates_h * P, 2 * D * rows * H * P if projection else 0


def forward_flops(cell: str, input, weights, bidirectional: bool, num_layers: int = 1) -> int:
    """From shapes: the products alone, as torch counts matrix products; gates and padding past a length are not told
    apart."""
    return sum(
        sum(_products(cell, x, part, bidirectional)) for x, part in _layers(input, weights, bidirectional, num_layers)
    )


def backward_flops(cell: str, input, weights, bidirectional: bool, needs, num_layers: int = 1) -> int:
    """needs: of input, h0, c0 and the weights of all layers."""
    total, below, per = 0, any(needs[:3]), len(weights) // num_layers
    for k, (x, part) in enumerate(_layers(input, weights, bidirectional, num_layers)):
        needed = needs[3 + k * per : 3 + (k + 1) * per]
        needs_input = below if k else needs[0]  # whether anything below wants a gradient
        below = below or any(needed)
        total += _layer_backward_flops(cell, x, part, bidirectional, needs_input, needed) if below else 0
    return total


def _layers(input, weights, bidirectional: bool, num_layers: int):
    """The shapes of each layer's input and weights."""
    per = len(weights) // num_layers
    for k in range(num_layers):
        part = weights[k * per : (k + 1) * per]
        yield input, part
        input = (*input[:-1], (2 if bidirectional else 1) * part[1][1])


def _layer_backward_flops(cell: str, input, weights, bidirectional: bool, needs_input: bool, needs) -> int:
    """needs: of the weights."""
    into_input, recurrent, state = _products(cell, input, weights, bidirectional)
    D = 2 if bidirectional else 1
    per = len(weights) // D
    total = into_input * needs_input + recurrent + state
    for d in range(D):
        needed = needs[d * per : (d + 1) * per]
        total += (into_input * needed[0] + recurrent * needed[1] + (state * needed[-1] if state else 0)) // D
    return total


@register_flop_formula(torch.ops.fastrnn.layer)
def _(cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, *_, **__) -> int:
    return forward_flops(cell, input, weights, bidirectional)


@register_flop_formula(torch.ops.fastrnn.stack)
def _(
    cell, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, num_layers, *_, **__
) -> int:
    return forward_flops(cell, input, weights, bidirectional, num_layers)


@register_flop_formula(torch.ops.fastrnn.step)
def _(cell, input, h0, c0, weights, *_, **__) -> int:
    return forward_flops(cell, input, weights, False)


@register_flop_formula(torch.ops.fastrnn.step_)
def _(h, c, cell, input, weights, packed, num_layers, *_, **__) -> int:
    return forward_flops(cell, input, weights, False, num_layers) if weights else 0  # packed weights have no shapes


@register_flop_formula(torch.ops.fastrnn.layer_backward)
def _(cell, input, h0, c0, weights, *rest, **_) -> int:
    bidirectional, needs = rest[9], rest[11]
    # A layer by itself: its recurrence runs whatever is wanted of it.
    return _layer_backward_flops(cell, input, weights, bidirectional, needs[0], needs[3:])


@register_flop_formula(torch.ops.fastrnn.layer_operands)
def _(cell, input, h0, c0, weights, *rest, **_) -> int:
    bidirectional, needs = rest[9], rest[11]
    return _layer_backward_flops(cell, input, weights, bidirectional, needs[0], [False] * len(weights))


@register_flop_formula(torch.ops.fastrnn.stack_backward)
def _(cell, input, h0, c0, weights, *rest, **_) -> int:
    bidirectional, _batch_major, num_layers, needs = rest[7:11]
    return backward_flops(cell, input, weights, bidirectional, needs, num_layers)
