"""The plain equations, one row and one step at a time, as torch operations: slow, obvious, differentiable.

Written from the public contract (README, docstrings), not from fastrnn/reference.py, so that the two can disagree.
Also `exact`: the same equations with hand-written gradients in numpy's long double, the truth for float64 tests.
"""

import numpy as np
import torch


def step(kind, x, h, c, w_ih, w_hh, b_ih=None, b_hh=None, w_hr=None):
    """One step of one row: x (I,), h (P,), c (H,) -> h, c."""
    gi, gh = w_ih @ x, w_hh @ h
    if b_ih is not None:
        gi, gh = gi + b_ih, gh + b_hh
    if kind == "RNN_TANH":
        return torch.tanh(gi + gh), c
    if kind == "RNN_RELU":
        return torch.relu(gi + gh), c
    if kind == "LSTM":
        i, f, g, o = (gi + gh).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w_hr is None else w_hr @ h), c
    (ri, zi, ni), (rh, zh, nh) = gi.chunk(3), gh.chunk(3)
    r, z = torch.sigmoid(ri + rh), torch.sigmoid(zi + zh)
    n = torch.tanh(ni + r * nh)
    return (1 - z) * n + z * h, c


def run(kind, x, h0, c0, weights, *, layers=1, directions=1, reset=None, lengths=None, starts=None):
    """x (T, B, I), h0 (L*D, B, P), c0 (L*D, B, H) or None, weights[l*D+d] = (w_ih, w_hh, b_ih, b_hh, w_hr) or fewer.

    reset, lengths: (T, B) and (B,) or None. starts: h and c after a reset, as h0 and c0, or None for zero.
    Returns output (T, B, D*P), h_n, c_n (c_n None unless LSTM), h_all (L*D, T, B, P), c_all.
    """
    T, B = x.shape[:2]
    rows = []
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        layer_in = [x[t, b] for t in range(n)]
        h_n, c_n, h_all, c_all = [], [], [], []
        for layer in range(layers):
            outs = []
            for d in range(directions):
                k = layer * directions + d
                h = h0[k, b]
                c = c0[k, b] if c0 is not None else torch.zeros(0, dtype=x.dtype)
                hs, cs = [None] * n, [None] * n
                for t in range(n) if d == 0 else reversed(range(n)):
                    if d == 0:
                        cut = reset is not None and bool(reset[t, b])
                    else:
                        cut = reset is not None and t + 1 < n and bool(reset[t + 1, b])
                    if cut:
                        h, c = [torch.zeros_like(v) for v in (h, c)] if starts is None else [v[k, b] for v in starts]
                    h, c = step(kind, layer_in[t], h, c, *weights[k])
                    hs[t], cs[t] = h, c
                past = [torch.zeros_like(h)] * (T - n)
                h_n.append(h)
                c_n.append(c)
                h_all.append(torch.stack(hs + past))
                c_all.append(torch.stack(cs + [torch.zeros_like(c)] * (T - n)))
                outs.append(hs)
            layer_in = [torch.cat([o[t] for o in outs]) for t in range(n)]
        width = directions * h0.shape[2]
        output = torch.stack(layer_in + [torch.zeros(width, dtype=x.dtype)] * (T - n))
        rows.append((output, torch.stack(h_n), torch.stack(c_n), torch.stack(h_all), torch.stack(c_all)))
    output, h_n, c_n, h_all, c_all = zip(*rows)
    is_lstm = kind == "LSTM"
    return (
        torch.stack(output, 1),
        torch.stack(h_n, 1),
        torch.stack(c_n, 1) if is_lstm else None,
        torch.stack(h_all, 2),
        torch.stack(c_all, 2) if is_lstm else None,
    )


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def exact_direction(kind, xs, h, c, weights, reverse, dys, dcs, dh, dc, cuts, h_start, c_start):
    """One direction of one layer in long double: states, and gradients of everything, by hand.

    xs, dys, dcs: per step (B, .); cuts: per step (B, 1), true where the state that enters the step is h_start, c_start.
    """
    dh_start, dc_start = np.zeros_like(h_start), np.zeros_like(c_start)
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    bi, bh = (0, 0) if b_ih is None else (b_ih, b_hh)
    order = list(range(len(xs)))[:: -1 if reverse else 1]
    hs, cs, tape = [None] * len(xs), [None] * len(xs), {}
    for t in order:
        h, c = np.where(cuts[t], h_start, h), np.where(cuts[t], c_start, c)
        gi, gh = xs[t] @ w_ih.T + bi, h @ w_hh.T + bh
        if kind == "LSTM":
            i, f, g, o = np.split(gi + gh, 4, -1)
            i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
            c_new = f * c + i * g
            raw = o * np.tanh(c_new)
            new = raw if w_hr is None else raw @ w_hr.T
            tape[t] = (h, c, i, f, g, o, c_new, raw)
            c = c_new
        elif kind == "GRU":
            (ri, zi, ni), (rh, zh, nh) = np.split(gi, 3, -1), np.split(gh, 3, -1)
            r, z = sigmoid(ri + rh), sigmoid(zi + zh)
            n = np.tanh(ni + r * nh)
            new = (1 - z) * n + z * h
            tape[t] = (h, r, z, n, nh)
        else:
            new = np.tanh(gi + gh) if kind == "RNN_TANH" else np.maximum(gi + gh, 0)
            tape[t] = (h, new)
        hs[t], cs[t] = h, c = new, c
    h_n, c_n = h, c
    grads = [None if w is None else np.zeros_like(w) for w in weights]
    dxs = [None] * len(xs)
    for t in reversed(order):
        dh, dc = dh + dys[t], dc + dcs[t]
        if kind == "LSTM":
            h, c, i, f, g, o, c_new, raw = tape[t]
            if w_hr is not None:
                grads[4] += dh.T @ raw
                dh = dh @ w_hr
            tc = np.tanh(c_new)
            dc = dc + dh * o * (1 - tc * tc)
            dgi = np.concatenate(
                [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * tc * o * (1 - o)], -1
            )
            dgh, direct, dc = dgi, 0, dc * f
        elif kind == "GRU":
            h, r, z, n, nh = tape[t]
            dn = dh * (1 - z) * (1 - n * n)
            dz = dh * (h - n) * z * (1 - z)
            dr = dn * nh * r * (1 - r)
            dgi, dgh, direct = np.concatenate([dr, dz, dn], -1), np.concatenate([dr, dz, dn * r], -1), dh * z
        else:
            h, new = tape[t]
            dgi = dgh = dh * ((1 - new * new) if kind == "RNN_TANH" else (new > 0))
            direct = 0
        grads[0] += dgi.T @ xs[t]
        grads[1] += dgh.T @ h
        if b_ih is not None:
            grads[2] += dgi.sum(0)
            grads[3] += dgh.sum(0)
        dxs[t] = dgi @ w_ih
        dh = dgh @ w_hh + direct
        dh_start, dc_start = dh_start + np.where(cuts[t], dh, 0), dc_start + np.where(cuts[t], dc, 0)
        dh, dc = np.where(cuts[t], 0, dh), np.where(cuts[t], 0, dc)
    return hs, cs, h_n, c_n, dxs, dh, dc, dh_start, dc_start, grads


def exact_block(kind, x, h0, c0, weights, directions, dy, dh_n, dc_n, reset, dh_all, dc_all, h_start, c_start):
    """All layers of rows of one length. Layers run once upwards, to know their inputs, and once downwards."""
    T, P = len(x), h0.shape[2]
    inputs, layers = [x], len(weights) // directions
    start = np.zeros((1, x.shape[1]), bool)
    entering = [np.zeros((T, x.shape[1]), bool) if reset is None else reset]
    entering.append(np.concatenate([entering[0][1:], start]))
    zeros = [0] * T

    def direction(k, dys, dcs, dh, dc):
        layer, d = divmod(k, directions)
        cuts = entering[d][:, :, None]
        start = h_start[k], c_start[k]
        return exact_direction(kind, inputs[layer], h0[k], c0[k], weights[k], d, dys, dcs, dh, dc, cuts, *start)

    n = len(weights)
    nothing = np.zeros_like(h0[0]), np.zeros_like(c0[0])
    h_all, c_all, h_n, c_n, dh0, dc0, dh_start, dc_start, grads = ([None] * n for _ in range(9))
    for layer in range(layers):
        for k in range(layer * directions, (layer + 1) * directions):
            h_all[k], c_all[k], h_n[k], c_n[k], *_ = direction(k, zeros, zeros, *nothing)
        inputs.append(np.concatenate([np.stack(h_all[layer * directions + d]) for d in range(directions)], -1))
    for layer in reversed(range(layers)):
        below = 0
        for d in range(directions):
            k = layer * directions + d
            dys = dy[:, :, d * P : (d + 1) * P] + dh_all[k]
            *_, dxs, dh0[k], dc0[k], dh_start[k], dc_start[k], grads[k] = direction(k, dys, dc_all[k], dh_n[k], dc_n[k])
            below = below + np.stack(dxs)
        dy = below
    states = [np.stack([np.stack(v) for v in s]) for s in (h_all, c_all)]
    of_states = (np.stack(v) for v in (dh0, dc0, dh_start, dc_start))
    return inputs[-1], np.stack(h_n), np.stack(c_n), *states, dy, *of_states, grads


def exact(
    kind, x, h0, c0, weights, directions, dy, dh_n, dc_n, *, lengths=None, reset=None, dh_all=None, dc_all=None,
    starts=None,
):  # fmt: skip
    """`run` and its gradients in long double; numpy arrays shaped as there, d*: the incoming gradients.

    Returns output, h_n, c_n, h_all, c_all, dx, dh0, dc0, those of starts, and the list of gradients of weights.
    """
    x, h0, c0, dy, dh_n, dc_n = (v.astype(np.longdouble) for v in (x, h0, c0, dy, dh_n, dc_n))
    weights = [[None if w is None else w.astype(np.longdouble) for w in ws] for ws in weights]
    T, B, K, P, H = len(x), x.shape[1], len(weights), h0.shape[2], c0.shape[2]
    output, dx = np.zeros((T, B, directions * P), np.longdouble), np.zeros_like(x)
    h_n, c_n, dh0, dc0 = h0.copy(), c0.copy(), dh_n.copy(), dc_n.copy()
    h_all, c_all = np.zeros((K, T, B, P), np.longdouble), np.zeros((K, T, B, H), np.longdouble)
    dh_all = np.zeros_like(h_all) if dh_all is None else dh_all.astype(np.longdouble)
    dc_all = np.zeros_like(c_all) if dc_all is None else dc_all.astype(np.longdouble)
    h_start, c_start = (np.zeros_like(v) if starts is None else starts[i] + 0 * v for i, v in enumerate((h0, c0)))
    dh_start, dc_start = np.zeros_like(h_start), np.zeros_like(c_start)
    grads = [[None if w is None else np.zeros_like(w) for w in ws] for ws in weights]
    blocks = [(slice(None), T)] if lengths is None else [(slice(b, b + 1), int(lengths[b])) for b in range(B)]
    for rows, n in blocks:
        if n == 0:
            continue  # the state passes through, and so does its gradient
        values = exact_block(
            kind, x[:n, rows], h0[:, rows], c0[:, rows], weights, directions,
            dy[:n, rows], dh_n[:, rows], dc_n[:, rows],
            None if reset is None else reset[:n, rows], dh_all[:, :n, rows], dc_all[:, :n, rows],
            h_start[:, rows], c_start[:, rows],
        )  # fmt: skip
        output[:n, rows], h_n[:, rows], c_n[:, rows], h_all[:, :n, rows], c_all[:, :n, rows] = values[:5]
        dx[:n, rows], dh0[:, rows], dc0[:, rows], dh_start[:, rows], dc_start[:, rows] = values[5:10]
        grads = [[None if a is None else a + b for a, b in zip(g, v)] for g, v in zip(grads, values[10])]
    return output, h_n, c_n, h_all, c_all, dx, dh0, dc0, dh_start, dc_start, grads


def weights_of(module, convert=lambda p: p):
    """[layer * directions + direction] -> [w_ih, w_hh, b_ih, b_hh, w_hr], None where the module has none."""
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
    suffixes = [names[0].removeprefix("weight_ih") for names in module._all_weights]
    return [[convert(getattr(module, k + s)) if hasattr(module, k + s) else None for k in kinds] for s in suffixes]
