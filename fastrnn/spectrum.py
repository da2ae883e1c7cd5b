"""jacobian_spectrum: how long a recurrent layer remembers, read off the Jacobians of its states.

The step s_t = F(s_{t-1}, x_t) has the Jacobian J_t = ds_t / ds_{t-1}, and what is left of a change of the state after T
steps, or of a gradient sent back through them, is the product J_T ... J_1. Multiplied out it overflows, underflows, or
keeps only its largest direction. So it is carried as Q_t R_t ... R_1 with J_t Q_{t-1} = Q_t R_t, Q_t orthonormal and
R_t triangular (Benettin et al. 1980), and the factors R are multiplied with their scales apart, as logarithms.

The derivatives of the gates are taken of reference.pointwise, for many steps at a time: each is one number per hidden
unit, so that J_t is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastrnn import functional
from fastrnn.modules import resolve
from fastrnn.reference import pointwise

CHUNK = 1 << 20  # numbers in the pre-activations whose derivatives are held at a time


@dataclass(frozen=True)
class Spectrum:
    """What `jacobian_spectrum` finds. All tensors are float64; L layers, D directions, B rows, k exponents.

    Attributes:
        exponents: (L*D, k), the finite-time Lyapunov exponents, natural logarithm per step, largest first; the i-th is
            the mean over rows of their i-th. -inf: a direction that is lost altogether.
        row_exponents: (L*D, B, k), of each row.
        log_singular_values: (L*D, B, k), natural logarithms of the singular values of each row's whole product of
            Jacobians, largest first; None where fewer exponents were asked for than the state has numbers.
        steps: (B,), over how many steps that is.
    """

    exponents: Tensor
    row_exponents: Tensor = field(repr=False)
    log_singular_values: Tensor | None = field(repr=False)
    steps: Tensor
    cell: str
    directions: int

    @property
    def memory(self) -> Tensor:
        """(L*D,): after how many steps a change in the direction that is kept best has shrunk to 1/e of itself:
        -1 / the largest exponent; inf where that is not negative."""
        largest = self.exponents[:, 0]
        return torch.where(largest < 0, -1 / largest, math.inf)

    def outliving(self, steps: float) -> Tensor:
        """(L*D,): how many directions take longer than `steps` to shrink to 1/e."""
        return (self.exponents > -1 / steps).sum(1)

    def __str__(self) -> str:
        low, high = self.steps.aminmax()
        steps = f"{low}" if low == high else f"{low} to {high}"
        k, rows = self.exponents.size(1), len(self.steps)
        lines = [f"{self.cell}: {k} Lyapunov exponents per step, of {steps} steps in {rows} row{'s' * (rows > 1)}"]
        for i, values in enumerate(self.exponents):
            layer, reverse = divmod(i, self.directions)
            where = f"layer {layer}" + ("" if self.directions == 1 else " reverse" if reverse else " forward")
            shown = ", ".join(f"{value:.3g}" for value in values[:3]) + (f" ... {values[-1]:.3g}" if k > 3 else "")
            lives = ", ".join(f"{self.outliving(n)[i]} outlive {n}" for n in (10, 100, 1000))
            lines.append(f"  {where}: {shown}; memory {self.memory[i]:.3g} steps; {lives}")
        return "\n".join(lines)


def jacobian_spectrum(
    module: nn.RNNBase, x, hx=None, *, lengths: Tensor | None = None, k: int | None = None, burn_in: int = 0
) -> Spectrum:
    """Lyapunov exponents and singular values of the state-to-state Jacobians along a sequence.

    The state is h for RNN and GRU, and h and c one after the other for LSTM: n = hidden_size, or P + hidden_size with
    P = proj_size or hidden_size. Each layer and direction is taken by itself, its input given: what reaches its state
    by way of other layers is left out. Layers above the first get the input they would have in eval(), without dropout.

    Exponents are finite-time: the mean over the steps of log |diag R_t|, R_t from the QR decomposition after each step,
    started from one random orthonormal basis. All n of them add up to the mean of log |det J_t| exactly; each by itself
    differs from the limit of long sequences by O(1 / steps), less with `burn_in`. The largest says whether changes of
    the state, and gradients, vanish (below zero) or explode, and how fast. The singular values are those of the whole
    product, free of these remarks and of overflow. Everything is computed in float64, with the weights as they are.

    Letters: T steps, B rows, L layers, D directions. Costs about (n + 4 * hidden_size) * n * k operations and one
    QR decomposition of an (n, k) matrix for each step, row, layer and direction.

    Args:
        module: RNN, LSTM or GRU, fastrnn's or torch.nn's.
        x: as the module takes it: (T, B, I), (B, T, I) if batch_first, (T, I) unbatched, or a PackedSequence.
        hx: as the module takes it; None is zero.
        lengths: as fastrnn's modules take them; every row must be longer than burn_in. Not with a PackedSequence.
        k: how many exponents, from the largest on, 1 to n; None: all. Fewer cost less, and give no singular values.
        burn_in: so many first steps of each row turn the basis into place and are not counted, in all results.

    Returns:
        Spectrum, which prints itself readably. Not differentiable.

    Raises:
        TypeError: module is something else (cells have no sequence); ValueError: k, burn_in, lengths; states that are
        not finite. torch.nn's own errors for x and hx.

    Sources: Benettin, Galgani, Giorgilli and Strelcyn, "Lyapunov characteristic exponents for smooth dynamical systems
    and for Hamiltonian systems", Meccanica 15, 1980 (the method); Vogt, Puelma Touzel, Shlizerman and Lajoie, "On
    Lyapunov exponents for RNNs", Frontiers in Applied Mathematics and Statistics 8, 2022, and Engelken, Wolf and
    Abbott, "Lyapunov spectra of chaotic recurrent neural networks", Physical Review Research 5, 2023 (of RNNs);
    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, and Pennington,
    Schoenholz and Ganguli, "Resurrecting the sigmoid in deep learning through dynamical isometry", NeurIPS 2017
    (singular values and gradients).
    """
    if not isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)):
        raise TypeError(f"module: expected an RNN, LSTM or GRU, got {type(module).__name__}")
    P, H = module.proj_size or module.hidden_size, module.hidden_size
    n = P + H if module.mode == "LSTM" else H
    k = n if k is None else k
    for name, value, least, most in (("k", k, 1, n), ("burn_in", burn_in, 0, math.inf)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            expected = (
                f"a whole number from {least} to {most}" if most < math.inf else f"a whole number from {least} on"
            )
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    with torch.no_grad():
        layers = _Layers(module, x, hx, lengths, burn_in)
        return _spectrum(layers, n, k)


class _Layers:
    """All layers and directions of a call, L*D of them side by side, time in the order they go through it: a reverse
    direction's is turned round. `along` and what `derivatives` gives are (L*D, T, B, ·)."""

    def __init__(self, module, x, hx, lengths, burn_in: int):
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected None with a PackedSequence, which carries its own, got a value")
            x, lengths = pad_packed_sequence(x, batch_first=module.batch_first)
        call = resolve(module, x, hx)
        if call is None:
            module(x, hx)  # raises, as a rule
            raise ValueError("x, hx: expected shapes and dtypes that fit the module")
        self.cell, self.directions = call.cell, 2 if module.bidirectional else 1
        if lengths is not None:
            lengths = functional.check_lengths(lengths, call.T, call.B, call.unbatched).to(call.data.device)
        data, *weights = (t.detach().double() for t in (call.data, *call.weights))
        states = hx = None
        if call.hx is not None:
            states = tuple(t.detach().double() for t in (call.hx if call.cell == "lstm" else (call.hx,)))
            hx = states if call.cell == "lstm" else states[0]
        _, _, _, h_all, c_all = functional.run(
            call.cell, data, hx, weights, module.bias, module.num_layers, 0.0, False, module.bidirectional,
            call.batch_first, None, lengths, None, True,
        )  # fmt: skip
        for t in (h_all, c_all):
            if t is not None and not t.isfinite().all():
                raise ValueError("x, hx: expected a sequence along which all states are finite, got inf or nan in some")

        # Where each row has steps, and which of them count: (L*D, T, B).
        D, T, B = self.directions, call.T, call.B
        x = data.transpose(0, 1) if call.batch_first else data
        valid = torch.ones(T, B, dtype=torch.bool, device=x.device)
        if lengths is not None:
            valid = torch.arange(T, device=x.device).unsqueeze(1) < lengths
            x = torch.where(valid.unsqueeze(2), x, 0.0)
        self.valid = self.along(valid.expand(len(h_all), T, B))
        self.counted = self.valid & (self.valid.cumsum(1) > burn_in)
        self.steps = self.counted[0].sum(0)
        if not self.steps.all():
            raise ValueError(
                f"burn_in, lengths: expected more than burn_in = {burn_in} steps in every row, got "
                f"{valid.sum(0).min().item()}"
            )

        inputs = [x, *(torch.cat(tuple(h), 2) for h in h_all.split(D)[:-1])]
        self.inputs = [(t.flip(0) if d else t) for t in inputs for d in range(D)]
        starts = states or (torch.zeros_like(h_all[:, 0]), c_all if c_all is None else torch.zeros_like(c_all[:, 0]))
        self.h = self.entering(h_all, starts[0])
        self.c = None if c_all is None else self.entering(c_all, starts[1])
        per = len(weights) // len(h_all)
        roles = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if module.bias else []), *(["w_hr"] if module.proj_size else [])]
        self.weights = {role: weights[i::per] for i, role in enumerate(roles)}
        self.w_hh = torch.stack(self.weights["w_hh"]).unsqueeze(1)
        self.w_hr = torch.stack(self.weights["w_hr"]).unsqueeze(1) if module.proj_size else None
        self.hidden_size = module.hidden_size

    def along(self, t: Tensor) -> Tensor:
        """(L*D, T, ...) with the time of reverse directions turned round."""
        if self.directions == 1:
            return t
        return torch.stack([part.flip(0) if i % 2 else part for i, part in enumerate(t)])

    def entering(self, states: Tensor, start: Tensor) -> Tensor:
        """What goes into each step, from what comes out of each and the first."""
        before = self.along(states)[:, :-1]
        before = torch.where(self.valid[:, :-1].unsqueeze(3), before, start.unsqueeze(1))
        return torch.cat([start.unsqueeze(1), before], 1)

    def derivatives(self, begin: int, end: int):
        """Of h, and for LSTM of c, by the pre-activations (.., G*H) and by the h of a GRU or the c of an LSTM (.., H):
        pairs, for each step of a part of the time. Each new number depends on its own unit's alone."""
        b_ih, b_hh = (self.weights.get(b, [None] * len(self.inputs)) for b in ("b_ih", "b_hh"))
        h = self.h[:, begin:end]
        from_x = torch.stack([linear(x[begin:end], w, b) for x, w, b in zip(self.inputs, self.weights["w_ih"], b_ih)])
        from_h = torch.stack([linear(part, w, b) for part, w, b in zip(h, self.weights["w_hh"], b_hh)])
        gru, lstm = self.cell == "gru", self.cell == "lstm"

        def step(a, *state):
            h, c = pointwise(self.cell, from_x, a, state[0] if gru else None, state[0] if lstm else None)
            return (h, c) if lstm else (h,)

        point = [from_h, *([h] if gru else [self.c[:, begin:end]] if lstm else [])]
        results, pull = vjp(step, *point)
        one, zero = torch.ones_like(results[0]), torch.zeros_like(results[0])
        return [pull((one, zero)), pull((zero, one))] if lstm else [pull((one,))]

    def push(self, Q: Tensor, derivatives) -> Tensor:
        """J Q (L*D, B, n, k) of one step, from Q and that step's derivatives, (L*D, B, ·) each."""
        H, P = self.hidden_size, self.w_hh.size(3)
        Q_h, Q_c = Q[:, :, :P], Q[:, :, P:]
        A = (self.w_hh @ Q_h).unflatten(2, (-1, H))
        new = []
        for by_a, *by_state in derivatives:
            tangent = (by_a.unflatten(2, (-1, H)).unsqueeze(4) * A).sum(2)
            for by in by_state:
                tangent = tangent + by.unsqueeze(3) * (Q_c if self.cell == "lstm" else Q_h)
            new.append(tangent)
        if self.w_hr is not None:
            new[0] = self.w_hr @ new[0]
        return torch.cat(new, 2)


def _spectrum(layers: _Layers, n: int, k: int) -> Spectrum:
    LD, T, B = layers.valid.shape
    device = layers.valid.device
    # A basis in general position: the columns of the unit matrix may lie in directions that never mix. The first k are
    # the same whatever k is.
    start = torch.randn(n, n, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(start[:, :k])[0].to(device).repeat(LD, B, 1, 1)
    product = _Product(LD, B, n, k, device)
    chunk = max(1, CHUNK // (LD * B * layers.w_hh.size(2)))
    for begin in range(0, T, chunk):
        derivatives = layers.derivatives(begin, min(T, begin + chunk))
        for t in range(begin, min(T, begin + chunk)):
            new = layers.push(Q, [[part[:, t - begin] for part in of] for of in derivatives])
            new = torch.where(layers.valid[:, t, :, None, None], new, Q)
            Q = product.follow(new, layers.counted[:, t])
    exponents = product.logs() / layers.steps.unsqueeze(1)
    exponents = exponents.sort(-1, descending=True).values
    singular = product.log_singular_values() if k == n else None
    cell = layers.cell.removesuffix("_tanh").removesuffix("_relu").upper()
    return Spectrum(exponents.mean(1), exponents, singular, layers.steps, cell, layers.directions)


class _Product:
    """R_t ... R_1 of every layer, direction and row: `log` is log |diag|, and exp(scale) U the whole, if k == n. Of the
    k columns the first `rank` are alive: the others were mapped to nothing, or to less than double precision can tell
    from what the first are mapped to."""

    def __init__(self, LD: int, B: int, n: int, k: int, device):
        like = dict(dtype=torch.float64, device=device)
        self.log = torch.zeros(LD, B, k, **like)
        self.rank = torch.full((LD, B), k, device=device)
        self.scale = torch.zeros(LD, B, k, **like)
        self.U = torch.eye(k, **like).repeat(LD, B, 1, 1) if k == n else None
        self.tolerance = 8 * n * torch.finfo(torch.float64).eps
        self.places = torch.arange(k, device=device)

    def alive(self) -> Tensor:
        return self.places < self.rank.unsqueeze(2)

    def follow(self, new: Tensor, counted: Tensor) -> Tensor:
        """The next Q, from J Q (L*D, B, n, k). counted: (L*D, B), whether the step is to be part of the product."""
        Q, R = torch.linalg.qr(new)
        sizes = R.diagonal(dim1=-2, dim2=-1).abs()
        before = counted.unsqueeze(2) & self.alive()
        lost = before & (sizes <= self.tolerance * new.norm(dim=-2))
        for row in map(tuple, lost.any(2).nonzero().tolist()):
            order = self.put_lost_last(new[row], row)
            Q[row], R[row] = torch.linalg.qr(new[row][:, order])
            sizes[row] = R[row].diagonal().abs()
        after = before & self.alive()
        self.log = self.log + torch.where(after, sizes.log(), 0.0)
        if self.U is not None:
            after, before = after.unsqueeze(3), before.unsqueeze(2)
            R = torch.where(after & before, R, 0.0)
            logs = R.abs().log() + self.scale.unsqueeze(2)
            scale = logs.amax(3)
            factor = R.sign() * (logs - scale.unsqueeze(3)).exp()  # none above 1
            self.U = torch.where(after, factor @ self.U, self.U)
            self.scale = torch.where(after.squeeze(3), scale, self.scale)
        return Q

    def put_lost_last(self, new: Tensor, row: tuple[int, int]) -> list[int]:
        """The order of the columns in which those that depend on earlier ones come after all others."""
        kept, lost, basis = [], [], new[:, :0]
        rank = self.rank[row].item()
        for i in range(rank):
            rest = new[:, i]
            size = rest.norm()
            for _ in range(2):  # once leaves rounding errors of the size of what was taken away
                rest = rest - basis @ (basis.t() @ rest)
            if rest.norm() <= self.tolerance * size:
                lost.append(i)
            else:
                kept.append(i)
                basis = torch.cat([basis, (rest / rest.norm()).unsqueeze(1)], 1)
        order = [*kept, *lost, *range(rank, new.size(1))]
        self.rank[row] = len(kept)
        self.log[row], self.scale[row] = self.log[row][order], self.scale[row][order]
        if self.U is not None:
            self.U[row] = self.U[row][order]
        return order

    def logs(self) -> Tensor:
        """log |diag R_t ... R_1|, -inf where nothing is left."""
        return torch.where(self.alive(), self.log, -math.inf)

    def log_singular_values(self) -> Tensor:
        """(L*D, B, k), the logarithms of the singular values, largest first."""
        rows = zip(self.scale.flatten(0, 1), self.U.flatten(0, 1), self.rank.flatten().tolist())
        found = torch.full_like(self.log.flatten(0, 1), -math.inf)
        for out, (scale, U, rank) in zip(found, rows):
            if rank:
                out[:rank] = _log_singular_values(scale[:rank], U[:rank])
        return found.reshape(self.log.shape)


def _log_singular_values(log: Tensor, U: Tensor, most: int = 200) -> Tensor:
    """Of S = diag(exp(log)) U, of full rank r, whatever the range of log: (r,), largest first.

    The QR algorithm for graded triangular matrices: of S = R diag(exp(log)) with R upper triangular, the transpose is
    N diag(exp(log)), N_ij = R_ji exp(log_i - log_j), where large logarithms come first, so that nothing overflows; its
    own R has the same singular values, and is nearer to diagonal (Stewart, "On graded QR decompositions of products of
    matrices", 1997). Coupling that has faded divides the values into groups; inside of one they are close enough
    together for an ordinary SVD.
    """
    size = U.norm(dim=1)
    log, order = (log + size.log()).sort(descending=True)
    R = torch.linalg.qr((U / size.unsqueeze(1))[order].t()).R
    for _ in range(most):
        diagonal = R.diagonal().abs()
        R, log = R / diagonal, log + diagonal.log()
        # S = [[A, C], [0, B]]: without C the values change by at most the part |A^-1 C| of themselves.
        coupling = (R.triu(1).abs().log() + log - log.unsqueeze(1)).clamp(max=0)
        reach = coupling.flip(1).cummax(1).values.flip(1).cummax(0).values.diagonal(1)
        bounds = [0, *((reach < math.log(1e-13)).nonzero().squeeze(1) + 1).tolist(), len(log)]
        groups = [slice(a, b) for a, b in zip(bounds, bounds[1:])]
        if all((log[g].max() - log[g].min()).item() < 12 for g in groups):
            break
        log, order = log.sort(descending=True)  # S diag's columns in another order: the same singular values
        R = torch.linalg.qr(R[:, order]).R
        R = torch.linalg.qr(R.t() * (log.unsqueeze(1) - log).exp().tril()).R
    found = []
    for g in groups:
        top = log[g].max()
        found.append(top + torch.linalg.svdvals(R[g, g] * (log[g] - top).exp()).log())
    return torch.cat(found).sort(descending=True).values
