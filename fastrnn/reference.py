"""The plain equations in torch operations: one function for each cell's step, one loop over time for each direction.

What it is for: third derivatives, forward-mode AD and torch.func's gradients of gradients (plan.py), and `reset`,
`lengths` and `all_states` where no kernel serves (other devices). It is differentiable any number of times, works on
any device and dtype, and never waits for a device: every condition is a mask. double_backward.py takes the gates from
here, and differentiates them.

The equations are torch.nn's, from the docstrings of torch.nn.RNN, LSTM and GRU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def gates(cell: str, x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """The gates of one step (..., H), from x (..., G*H), the input projection, and a (..., G*H), what the state h
    becomes with its weights: i, f, g, o of the LSTM; r, z, n of the GRU; of an RNN the new h."""
    if cell == "rnn_tanh":
        return (torch.tanh(x + a),)
    if cell == "rnn_relu":
        return (torch.relu(x + a),)
    if cell == "gru":
        x_r, x_z, x_n = x.chunk(3, -1)
        h_r, h_z, h_n = a.chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        return r, z, torch.tanh(x_n + r * h_n)
    i, f, g, o = (x + a).chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def state(cell: str, gates: tuple[Tensor, ...], h: Tensor | None, c: Tensor | None):
    """The new h (..., H), before a projection, and c, from the gates and the states before."""
    if cell == "gru":
        _, z, n = gates
        return (1 - z) * n + z * h, None
    if cell != "lstm":
        return gates[0], None
    i, f, g, o = gates
    c = f * c + i * g
    return o * torch.tanh(c), c


def pointwise(cell: str, x: Tensor, a: Tensor, h: Tensor | None, c: Tensor | None):
    """`state` of `gates`."""
    return state(cell, gates(cell, x, a), h, c)


def _step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None):
    """One step of one direction. x (B, G*H) is the input projection; returns the new h (B, P), c (B, H), the gates."""
    found = gates(cell, x, linear(h, w_hh, b_hh))
    h, c = state(cell, found, h, c)
    return (h if w_hr is None else linear(h, w_hr)), c, found


def _direction(cell, x, h, c, weights, valid, cut, h_reset, c_reset, reverse: bool, watch=None):
    """One direction over the whole sequence.

    x (T, B, I), already zero past each row's length. valid, cut: None or bool (T, B, 1); where not valid the state
    stands still, cut[t] separates step t-1 from step t, which starts from h_reset (B, P) and c_reset (B, H), or 0.0.
    watch: None, or recording.Direction, which is told of states as they enter and leave a step.
    Returns lists over time of h and of c, and the last h and c.
    """
    bias = len(weights) >= 4
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if bias else (None, None)
    w_hr = weights[-1] if len(weights) % 2 else None
    projected = linear(x, w_ih, b_ih)
    T = x.size(0)
    hs, cs = [None] * T, [None] * T
    for t in range(T - 1, -1, -1) if reverse else range(T):
        # Where a row has ended, or its state is cut, the step starts from a true zero or the reset state: a NaN or inf
        # that waits in the state must not reach the gradients of the weights as 0 * NaN.
        h_in, c_in = (h, c) if watch is None else watch.enters(t, h, c)
        if valid is not None:
            h_in = torch.where(valid[t], h_in, 0.0)
            c_in = c if c is None else torch.where(valid[t], c_in, 0.0)
        boundary = t + 1 if reverse else t
        if cut is not None and boundary < T:
            h_in = torch.where(cut[boundary], h_reset, h_in)
            c_in = c if c is None else torch.where(cut[boundary], c_reset, c_in)
        h_new, c_new, found = _step(cell, projected[t], h_in, c_in, w_hh, b_hh, w_hr)
        if watch is not None:
            watch.leaves(t, h_new, c_new, found, None if valid is None else valid[t])
        if valid is None:
            h, c = h_new, c_new
            hs[t], cs[t] = h, c
        else:
            h = torch.where(valid[t], h_new, h)
            hs[t] = torch.where(valid[t], h_new, 0.0)
            if c is not None:
                c = torch.where(valid[t], c_new, c)
                cs[t] = torch.where(valid[t], c_new, 0.0)
    return hs, cs, h, c


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
    all_states: bool,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    watch=None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One layer: the arguments and results of `ops.layer`, without a tape, and None for what was not asked for.

    `lengths` may lie on any device and is clamped to 0..T. 16-bit storage is computed in float32, as the kernels do.
    watch: None, or recording.Steps.
    """
    dtype = input.dtype
    compute = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    D = 2 if bidirectional else 1
    per = len(weights) // D
    weights = [w.to(compute) for w in weights]
    H = weights[0].size(0) // GATES[cell]
    P = weights[1].size(1)

    x, rows = input, None
    if batch_sizes is not None:
        x, rows, lengths = unpack(input, batch_sizes)
    x = x.to(compute)
    T, B = x.size(0), x.size(1)
    valid = cut = None
    if lengths is not None:
        lengths = lengths.to(x.device).clamp(0, T)
        valid = (torch.arange(T, device=x.device).unsqueeze(1) < lengths).unsqueeze(2)
        x = torch.where(valid, x, 0.0)
    if reset is not None:
        cut = reset.to(x.device).unsqueeze(2)
        if valid is not None:
            cut = cut & valid  # an entry at or past a row's length is ignored

    outputs, h_n, c_n, h_all, c_all = [], [], [], [], []
    for d in range(D):
        h = x.new_zeros(B, P) if h0 is None else h0[d].to(compute)
        c = None
        if cell == "lstm":
            c = x.new_zeros(B, H) if c0 is None else c0[d].to(compute)
        starts = (0.0 if t is None else t[d].to(compute) for t in (h_reset, c_reset))
        watched = None if watch is None else watch(d, T)
        hs, cs, h, c = _direction(
            cell, x, h, c, weights[d * per : (d + 1) * per], valid, cut, *starts, reverse=d == 1, watch=watched
        )
        states = torch.stack(hs)
        outputs.append(states)
        h_n.append(h)
        c_n.append(c)
        if all_states:
            h_all.append(states)
            c_all.append(torch.stack(cs) if cell == "lstm" else None)

    output = torch.cat(outputs, 2).to(dtype)
    if rows is not None:
        output = output.reshape(T * B, D * P).index_select(0, rows)

    def stacked(parts):
        return torch.stack(parts).to(dtype) if parts and parts[0] is not None else None

    return output, stacked(h_n), stacked(c_n), stacked(h_all), stacked(c_all)


def unpack(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed (N, I) to (T, B, I), the place of each packed row in it flattened, and the lengths (B,)."""
    T, B = batch_sizes.size(0), int(batch_sizes[0])
    present = torch.arange(B) < batch_sizes.unsqueeze(1)
    rows = present.flatten().nonzero().squeeze(1).to(data.device)
    padded = data.new_zeros(T * B, data.size(1)).index_copy(0, rows, data)
    return padded.reshape(T, B, data.size(1)), rows, present.sum(0)


def layers(
    cell, num_layers, input, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, all_states, h_reset=None,
    c_reset=None, layer=layer,
):  # fmt: skip
    """`num_layers` of `layer` on top of each other: states, weights and results but output of all layers."""
    D, per = 2 if bidirectional else 1, len(weights) // num_layers
    states, output = [], input
    for k in range(num_layers):
        h, c, *starts = (None if t is None else t[k * D : (k + 1) * D] for t in (h0, c0, h_reset, c_reset))
        part = weights[k * per : (k + 1) * per]
        output, *found = layer(
            cell, output, h, c, part, batch_sizes, lengths, reset, bidirectional, all_states, *starts
        )
        states.append(found)
    return output, *(None if parts[0] is None else torch.cat(parts) for parts in zip(*states))
