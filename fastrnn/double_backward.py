"""The gradients of a layer's gradients, by two recurrences more instead of through the graph of a loop.

Let L = <u, f(x, h0, c0, W)> for the incoming gradients u, and v the incoming gradients of L's gradients. What they are
multiplied with is the derivative of L along v. So its gradient with respect to u is the tangent of the layer's results
along v, and the gradient with respect to x, h0, c0 and W is the tangent of back-propagation along v: a pass forward in
time and a pass backward, both linear. All that does not depend on the step before is done for all steps at once, with
torch's products, and the kernels give the states and the gradients of the pre-activations.

The derivatives of the cells are taken of reference.py's equations by torch.func.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.functional import linear

from fastrnn import ops, reference


def double_backward(
    cell: str, bidirectional: bool, batch_sizes, lengths, reset, incoming, tensors, cotangents, *starts
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of one layer.

    Args:
        batch_sizes, lengths, reset: as of `ops.layer`.
        incoming: the gradients d_output, d_h_n, d_c_n, d_h_all, d_c_all that back-propagation was given, or None.
        tensors: input, h0, c0 and the weights.
        cotangents: the gradients of their gradients, in that order, or None; then those of `starts`.
        starts: h_reset and c_reset, or nothing.

    Returns:
        The gradients of the five in `incoming`, whether given or not, and of `tensors` and `starts` (None where that
        is None).
    """
    dtype = tensors[0].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def wide(t):
        return None if t is None else t.detach().to(compute)

    x, h0, c0, *weights = map(wide, tensors)
    vx, vh0, vc0, *vw = map(wide, cotangents[: len(tensors)])
    starts = [wide(t) for t in starts]
    resets = (*starts, *map(wide, cotangents[len(tensors) :])) if starts else (None,) * 4
    u_output, *u_states = map(wide, incoming)
    rows = None
    if batch_sizes is not None:
        x, rows, lengths = reference.unpack(x, batch_sizes)
        lengths = lengths.to(x.device)
        T, B = x.shape[:2]

        def padded(t):
            if t is None:
                return None
            return t.new_zeros(T * B, t.size(1)).index_copy(0, rows, t).reshape(T, B, t.size(1))

        vx, u_output = padded(vx), padded(u_output)
    T, B = x.shape[:2]
    valid = cut = None
    if lengths is not None:
        valid = (torch.arange(T, device=x.device).unsqueeze(1) < lengths).unsqueeze(2)
        x = torch.where(valid, x, 0.0)
        vx, u_output = (None if t is None else torch.where(valid, t, 0.0) for t in (vx, u_output))
    if reset is not None:
        cut = reset.unsqueeze(2) if valid is None else reset.unsqueeze(2) & valid

    given = (cell, x, h0, c0, weights, None, lengths, reset)
    *_, h_all, c_all, tape = ops.layer(*given, bidirectional, False, True, True, ops.EXACT, *starts)
    operands = ops.layer_operands(*given, tape, u_output, *u_states, bidirectional, False, [False] * 3, *starts)[3:]
    u_h_n, u_c_n, u_h_all, u_c_all = u_states

    D, per = 2 if bidirectional else 1, len(weights) // (2 if bidirectional else 1)
    P = h_all.size(3)
    found = []
    for d in range(D):

        def of(t, d=d):
            return None if t is None or not t.numel() else t[d]

        u_h, u_c = of(u_h_all), of(u_c_all)
        if u_output is not None:
            half = u_output[..., d * P : (d + 1) * P]
            u_h = half if u_h is None else u_h + half
        direction = _Direction(
            cell, weights[d * per : (d + 1) * per], vw[d * per : (d + 1) * per], valid, cut, *map(of, resets),
            reverse=d == 1,
        )  # fmt: skip
        found.append(
            direction.run(
                x, vx, of(h0), of(c0), of(vh0), of(vc0), of(c_all), [t[d] for t in operands], u_h, u_c, of(u_h_n),
                of(u_c_n),
            )
        )  # fmt: skip

    states, inputs, by_weight = zip(*found)
    output = torch.cat([s[0] for s in states], 2)
    by_x = sum(i[0] for i in inputs)
    if rows is not None:
        output, by_x = (t.reshape(T * B, t.size(2)).index_select(0, rows) for t in (output, by_x))

    def stacked(parts):
        return None if parts[0] is None else torch.stack(parts)

    h_all, c_all, h_n, c_n = (stacked([s[i] for s in states]) for i in range(4))
    by_h0, by_c0, *by_starts = (stacked([i[k] for i in inputs]) for k in (1, 2, 3, 4))
    by_incoming = [output, h_n, c_n, h_all, c_all]
    by_tensor = [by_x, by_h0 if h0 is not None else None, by_c0 if c0 is not None else None, *sum(by_weight, [])]
    by_tensor += by_starts if starts else []
    return tuple([None if t is None else t.to(dtype) for t in ts] for ts in (by_incoming, by_tensor))


def _or_zero(t):
    return 0.0 if t is None else t


def _pointwise(cell: str, slots, h, c):
    """A step from its pre-activations, slot by slot (cells.h): the new h before a projection, and c."""
    if cell == "gru":
        n_h, r, z, n_x = slots
        nothing = torch.zeros_like(n_h)
        return reference.pointwise(cell, torch.cat([r, z, n_x], -1), torch.cat([nothing, nothing, n_h], -1), h, c)
    a = torch.cat(slots, -1) if len(slots) > 1 else slots[0]
    return reference.pointwise(cell, a, a.new_zeros(()), h, c)


class _Direction:
    """One direction of a layer. Time runs as the direction does; sequences are (T, B, ...)."""

    def __init__(
        self, cell, weights, tangents, valid, cut, h_reset, c_reset, v_h_reset, v_c_reset, reverse: bool
    ):  # fmt: skip
        self.resets, self.v_resets = (h_reset, c_reset), (v_h_reset, v_c_reset)
        self.cell, self.reverse = cell, reverse
        traits = ops.CELLS[cell]
        self.G, self.S, self.first, self.order = (traits[k] for k in ("gates", "slots", "x_first", "hidden_gate"))
        roles = ops.roles(len(weights))
        self.w, self.v = dict(zip(roles, weights)), dict(zip(roles, tangents))
        self.H = weights[0].size(0) // self.G
        self.w_hh, self.v_hh = self.by_slot(self.w["w_hh"]), self.by_slot(self.v["w_hh"])
        self.valid = None if valid is None else self.turned(valid)
        self.cut = None
        if cut is not None:
            # Backward in time a step is cut from the one that comes after it.
            self.cut = torch.cat([cut[1:], torch.zeros_like(cut[:1])]).flip(0) if reverse else cut

    def turned(self, t):
        return t.flip(0) if self.reverse and t is not None else t

    def by_slot(self, w):
        """Rows of torch's gates as rows of the slots that the state feeds."""
        return None if w is None else ops.in_order(w.unflatten(0, (self.G, self.H)), 0, self.order).flatten(0, 1)

    def entering(self, states, first, reset):
        """What enters each step: the state after the step before, `first` where there is none, `reset` after a cut."""
        before = states[:-1] if self.valid is None else torch.where(self.valid[:-1], states[:-1], first)
        entered = torch.cat([first.unsqueeze(0), before])
        return entered if self.cut is None else torch.where(self.cut, _or_zero(reset), entered)

    def run(self, x, vx, h0, c0, vh0, vc0, c_all, operands, u_h, u_c, u_h_n, u_c_n):
        """Returns the tangents (h_all, c_all, h_n, c_n), the gradients (x, h0, c0, h_reset, c_reset), and those of the
        weights."""
        T, B = x.shape[:2]
        w, v, G, S, H = self.w, self.v, self.G, self.S, self.H
        has_c = self.cell == "lstm"
        x, vx, c_all, u_h, u_c = map(self.turned, (x, vx, c_all, u_h, u_c))
        dgates, h_prev, *projection = map(self.turned, operands)
        P = h_prev.size(2)
        nothing = x.new_zeros(B, H)
        c_prev = self.entering(c_all, nothing if c0 is None else c0, self.resets[1]) if has_c else None

        # The derivatives of h (before a projection) and c by the slots and by the h and c before.
        of_x = linear(x, w["w_ih"], w.get("b_ih")).unflatten(2, (G, H))
        b_hh = self.by_slot(w.get("b_hh"))
        of_h = linear(h_prev, self.w_hh, b_hh).unflatten(2, (G, H))
        slots = x.new_zeros(T, B, S, H)
        slots[:, :, self.first : self.first + G] += of_x
        slots[:, :, :G] += of_h
        reads_h = self.cell == "gru"
        point = [*slots.unbind(2), *([h_prev] if reads_h else []), *([c_prev] if has_c else [])]

        def step(*values):
            h, c = _pointwise(self.cell, values[:S], values[S] if reads_h else None, values[-1] if has_c else None)
            return (h, c) if has_c else (h,)

        results, pull = vjp(step, *point)
        ones, zeros = torch.ones_like(results[0]), torch.zeros_like(results[0])
        h_by = pull((ones, zeros) if has_c else (ones,))
        c_by = pull((zeros, ones)) if has_c else None
        h_by_slot, h_by_h = torch.stack(h_by[:S], 2), h_by[S] if reads_h else None
        c_by_slot, h_by_c, c_by_c = (torch.stack(c_by[:S], 2), h_by[-1], c_by[-1]) if has_c else (None,) * 3

        # Forward: the tangents of the pre-activations, of what enters each step, and of h and c.
        tangents = x.new_zeros(T, B, S, H)
        from_x = tangents[:, :, self.first : self.first + G]
        from_h = tangents[:, :, :G]
        if vx is not None:
            from_x += linear(vx, w["w_ih"]).unflatten(2, (G, H))
        if v["w_ih"] is not None:
            from_x += linear(x, v["w_ih"]).unflatten(2, (G, H))
        if v.get("b_ih") is not None:
            from_x += v["b_ih"].unflatten(0, (G, H))
        if self.v_hh is not None:
            from_h += linear(h_prev, self.v_hh).unflatten(2, (G, H))
        if v.get("b_hh") is not None:
            from_h += self.by_slot(v["b_hh"]).unflatten(0, (G, H))
        h_raw = projection[1] if projection else None
        through_v = linear(h_raw, v["w_hr"]) if projection and v["w_hr"] is not None else None
        h = x.new_zeros(B, P) if vh0 is None else vh0
        c = (nothing if vc0 is None else vc0) if has_c else None
        h_in, c_in, raw, h_out, c_out = ([None] * T for _ in range(5))
        flat = tangents.flatten(2)
        v_h_reset, v_c_reset = map(_or_zero, self.v_resets)
        for t in range(T):
            if self.cut is not None:
                h_in[t] = torch.where(self.cut[t], v_h_reset, h)
                c_in[t] = torch.where(self.cut[t], v_c_reset, c) if has_c else None
            else:
                h_in[t], c_in[t] = h, c
            flat[t, :, : G * H].addmm_(h_in[t], self.w_hh.t())
            new = (tangents[t] * h_by_slot[t]).sum(1)
            if reads_h:
                new = torch.addcmul(new, h_by_h[t], h_in[t])
            if has_c:
                new = torch.addcmul(new, h_by_c[t], c_in[t])
                c_new = torch.addcmul((tangents[t] * c_by_slot[t]).sum(1), c_by_c[t], c_in[t])
            raw[t] = new
            if projection:
                new = linear(new, w["w_hr"])
                new = new if through_v is None else new + through_v[t]
            if self.valid is None:
                h, c = new, c_new if has_c else None
                h_out[t], c_out[t] = h, c
            else:
                h_out[t] = torch.where(self.valid[t], new, 0.0)
                h = torch.where(self.valid[t], new, h)
                if has_c:
                    c_out[t] = torch.where(self.valid[t], c_new, 0.0)
                    c = torch.where(self.valid[t], c_new, c)
        h_in, h_out = torch.stack(h_in), torch.stack(h_out)
        c_in, c_out = (torch.stack(c_in), torch.stack(c_out)) if has_c else (None, None)

        # Back-propagation again: the gradients of h and c at each step, from those of the pre-activations.
        dgates = dgates.unflatten(2, (S, H))
        of_state = dgates[:, :, :G].flatten(2)
        recurrent = of_state @ self.w_hh
        dh, draw, dc = ([None] * T for _ in range(3))
        carry = x.new_zeros(B, P) if u_h_n is None else u_h_n
        carry_c = (nothing if u_c_n is None else u_c_n) if has_c else None
        for t in reversed(range(T)):
            dh[t] = carry if u_h is None else carry + u_h[t]
            draw[t] = dh[t] @ w["w_hr"] if projection else dh[t]
            new = torch.addcmul(recurrent[t], h_by_h[t], draw[t]) if reads_h else recurrent[t]
            if has_c:
                dc[t] = carry_c if u_c is None else carry_c + u_c[t]
                c_new = torch.addcmul(h_by_c[t] * draw[t], c_by_c[t], dc[t])
                carry_c = self.carried(t, c_new, carry_c)
            carry = self.carried(t, new, carry)
        dh, draw = (self.inside(torch.stack(parts)) for parts in (dh, draw))
        dc = self.inside(torch.stack(dc)) if has_c else None

        # Its tangent: what the changed derivatives of the cell make of those gradients, then the recurrence.
        def back(*values):
            _, pull = vjp(step, *values)
            return pull((draw, dc) if has_c else (draw,))

        moved = [*tangents.unbind(2), *([h_in] if reads_h else []), *([c_in] if has_c else [])]
        _, sources = jvp(back, tuple(point), tuple(moved))
        ddgates = torch.stack(sources[:S], 2)
        source_h, source_c = sources[S] if reads_h else None, sources[-1] if has_c else None
        added = None if self.v_hh is None else of_state @ self.v_hh
        added_raw = dh @ v["w_hr"] if projection and v["w_hr"] is not None else None
        ddh = [None] * T
        carry, carry_c = x.new_zeros(B, P), nothing if has_c else None
        by_h_reset, by_c_reset = x.new_zeros(B, P), nothing.clone() if has_c else None
        flat = ddgates.flatten(2)
        for t in reversed(range(T)):
            ddh[t] = carry
            raw_t = carry
            if projection:
                raw_t = carry @ w["w_hr"]
                raw_t = raw_t if added_raw is None else raw_t + added_raw[t]
            ddgates[t].addcmul_(h_by_slot[t], raw_t.unsqueeze(1))
            if has_c:
                ddgates[t].addcmul_(c_by_slot[t], carry_c.unsqueeze(1))
                c_new = torch.addcmul(torch.addcmul(source_c[t], h_by_c[t], raw_t), c_by_c[t], carry_c)
                if self.cut is not None:
                    by_c_reset += torch.where(self.cut[t], c_new, 0.0)
                carry_c = self.carried(t, c_new, carry_c)
            if self.valid is not None:
                ddgates[t].mul_(self.valid[t].unsqueeze(2))
            new = flat[t, :, : G * H] @ self.w_hh
            if added is not None:
                new += added[t]
            if reads_h:
                new += torch.addcmul(source_h[t], h_by_h[t], raw_t)
            if self.cut is not None:
                by_h_reset += torch.where(self.cut[t], new, 0.0)
            carry = self.carried(t, new, carry)
        ddh = self.inside(torch.stack(ddh))

        def outer(left, right):
            return left.flatten(0, 1).t() @ right.flatten(0, 1)

        (dd_x, dd_h), (d_x, d_h) = (ops.by_gate(self.cell, t) for t in (ddgates, dgates))
        by_x = dd_x @ w["w_ih"]
        if v["w_ih"] is not None:
            by_x += d_x @ v["w_ih"]
        by_weight = {"w_ih": outer(dd_x, x), "w_hh": outer(dd_h, h_prev) + outer(d_h, h_in)}
        if vx is not None:
            by_weight["w_ih"] += outer(d_x, vx)
        if "b_ih" in w:
            by_weight |= {"b_ih": dd_x.sum((0, 1)), "b_hh": dd_h.sum((0, 1))}
        if projection:
            raw = self.inside(torch.stack(raw))
            by_weight["w_hr"] = outer(ddh, h_raw) + outer(dh, raw)
        h_out, c_out, by_x = map(self.turned, (h_out, c_out, by_x))
        by_inputs = (by_x, carry, carry_c, by_h_reset, by_c_reset)
        return (h_out, c_out, h, c), by_inputs, [by_weight[role] for role in w]

    def carried(self, t, new, old):
        """What of a gradient goes on from step t to the one before."""
        if self.cut is not None:
            new = torch.where(self.cut[t], 0.0, new)
        return new if self.valid is None else torch.where(self.valid[t], new, old)

    def inside(self, t):
        """Zero past a row's length."""
        return t if self.valid is None else torch.where(self.valid, t, 0.0)
