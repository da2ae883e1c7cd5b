"""What must hold for every shape, stride and state: hypothesis looks for the one where it does not."""

import fastrnn._C as _C
import hypothesis.strategies as st
import torch
from conftest import ISAS, KINDS, build, flat, tensors_in
from hypothesis import given

SIZE = st.integers(1, 40)


@st.composite
def networks(draw, directions=(1, 2), dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    """(module, x, hx): any cell, size, dtype and tier; hx given or not."""
    kind = draw(st.sampled_from([*KINDS, "LSTM projected"]))
    kind, *projected = kind.split()
    _C.set_isa(draw(st.sampled_from(ISAS)))
    I, H = draw(SIZE), draw(SIZE)
    T, B = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    layers, D = draw(st.integers(1, 3)), draw(st.sampled_from(directions))
    P = draw(st.integers(1, H - 1)) if projected and H > 1 else 0
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 1000)))
    rnn = build(
        kind, I, H, num_layers=layers, bias=draw(st.booleans()), bidirectional=D == 2, dtype=dtype,
        **({"proj_size": P} if P else {}),
    )  # fmt: skip
    x = torch.randn(T, B, I, dtype=dtype)
    hx = None
    if draw(st.booleans()):
        hx = torch.randn(layers * D, B, P or H, dtype=dtype)
        hx = (hx, torch.randn(layers * D, B, H, dtype=dtype)) if kind == "LSTM" else hx
    return rnn, x, hx


def equal(a, b):
    a, b = tensors_in(a), tensors_in(b)
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))


def assert_same(a, b, one_step=False):
    """Bit for bit; but one step of up to four rows is summed in another order (csrc/cpu/pack.h,
    few_enough_for_dots)."""
    if one_step:
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= 8 * torch.finfo(a.dtype).eps * (1 + b.double().norm())
    else:
        assert a.equal(b)


def states(hx, f):
    return None if hx is None else tuple(f(h) for h in hx) if isinstance(hx, tuple) else f(hx)


@given(networks(directions=(1,), dtypes=(torch.float32, torch.float64)), st.data())
def test_a_sequence_can_be_cut_anywhere(network, data):
    """Not in 16 bits: there a state is carried in float32 inside a call, and rounded between two."""
    rnn, x, hx = network
    t = data.draw(st.integers(0, len(x)))
    with torch.no_grad():
        whole, last = rnn(x, hx)
        parts, state = [], hx
        for part in (x[:t], x[t:]):
            if len(part):
                output, state = rnn(part, state)
                parts.append(output)
    one_step = 1 in (t, len(x) - t) and x.shape[1] <= 4
    for a, b in zip([torch.cat(parts), *tensors_in(state)], [whole, *tensors_in(last)], strict=True):
        assert_same(a, b, one_step)


@given(networks(), st.data())
def test_permuting_the_batch_permutes_the_results(network, data):
    rnn, x, hx = network
    order = torch.tensor(data.draw(st.permutations(range(x.shape[1]))), dtype=torch.int64)
    with torch.no_grad():
        plain = tensors_in(rnn(x, hx, all_states=True))
        moved = tensors_in(rnn(x[:, order], states(hx, lambda h: h[:, order]), all_states=True))
    for a, b in zip(plain, moved, strict=True):
        assert a.index_select(a.dim() - 2, order).equal(b)


@given(networks(directions=(1,)))
def test_the_reverse_direction_is_the_forward_one_read_backwards(network):
    rnn, x, hx = network
    both = build(
        rnn.mode, rnn.input_size, rnn.hidden_size, num_layers=1, bias=rnn.bias, bidirectional=True, dtype=x.dtype,
        **({"proj_size": rnn.proj_size} if rnn.proj_size else {}),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in both.named_parameters():
            p.copy_(getattr(rnn, name.removesuffix("_reverse")))
        first = states(hx, lambda h: h[:1])
        output, hidden = both(x, states(first, lambda h: h.repeat(2, 1, 1)))
        forward = both(x.flip(0), states(first, lambda h: h.repeat(2, 1, 1)))
    width = output.shape[-1] // 2
    assert output[..., width:].equal(forward[0][..., :width].flip(0))
    assert all(h[1].equal(f[0]) for h, f in zip(flat(hidden), flat(forward[1]), strict=True))


@given(networks(), st.data())
def test_strides_do_not_matter(network, data):
    rnn, x, hx = network
    order = data.draw(st.permutations([0, 1, 2]))
    steps = data.draw(st.tuples(*[st.integers(1, 3)] * 3))

    def restride(v):
        room = torch.full(
            [n * s for n, s in zip((v.shape[d] for d in order), steps, strict=True)], torch.nan, dtype=v.dtype
        )
        view = room[:: steps[0], :: steps[1], :: steps[2]].permute([order.index(d) for d in range(3)])
        view.copy_(v)
        return view

    with torch.no_grad():
        assert equal(rnn(restride(x), states(hx, restride)), rnn(x, hx))


@given(networks(), st.data())
def test_lengths_and_reset_act_row_by_row(network, data):
    """Every row of a batch with lengths and resets is what that row gives alone."""
    rnn, x, hx = network
    T, B = x.shape[:2]
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B)), dtype=torch.int64)
    reset = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T * B, max_size=T * B)), dtype=torch.bool).view(
        T, B
    )
    with torch.no_grad():
        together = tensors_in(rnn(x, hx, lengths=lengths, reset=reset, all_states=True))
        for b in range(B):
            rows = slice(b, b + 1)
            one = rnn(
                x[:, rows], states(hx, lambda h, r=rows: h[:, r].contiguous()),
                lengths=lengths[rows], reset=reset[:, rows], all_states=True,
            )  # fmt: skip
            for a, c in zip(together, tensors_in(one), strict=True):
                assert_same(a[..., rows, :], c, T == 1 and B > 4)  # one step of few rows is summed in another order


@given(networks(), st.data())
def test_batch_first_and_unbatched_are_layouts(network, data):
    rnn, x, hx = network
    with torch.no_grad():
        output, hidden = rnn(x, hx)
        rnn.batch_first = True
        swapped, swapped_hidden = rnn(x.transpose(0, 1), hx)
        rnn.batch_first = False
        assert equal(swapped.transpose(0, 1), output)
        assert equal(swapped_hidden, hidden)
        if x.shape[1]:
            b = data.draw(st.integers(0, x.shape[1] - 1))
            alone, alone_hidden = rnn(x[:, b], states(hx, lambda h: h[:, b]))
            one_step = len(x) == 1 and x.shape[1] > 4
            assert_same(alone, output[:, b], one_step)
            for a, h in zip(flat(alone_hidden), flat(hidden), strict=True):
                assert_same(a, h[:, b], one_step)


@given(networks(dtypes=(torch.float32, torch.float64)))
def test_backward_of_any_shape_is_finite_and_complete(network):
    rnn, x, hx = network
    x.requires_grad_()
    outs = tensors_in(rnn(x, hx))
    grads = torch.autograd.grad(
        sum(o.square().sum() for o in outs), [x, *rnn.parameters()], allow_unused=x.shape[1] == 0
    )
    for g, p in zip(grads, [x, *rnn.parameters()], strict=True):
        assert g is None or (g.shape == p.shape and torch.isfinite(g).all())
