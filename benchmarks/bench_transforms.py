"""Per-sample gradients of 32 samples: fastrnn's `vmap(grad(...))`, the batch's one gradient, and loops over samples.
And a gradient penalty: the gradient of a norm of the gradient of the input.

    pytest benchmarks/bench_transforms.py
    pytest benchmarks/bench_transforms.py -k GRU --threads 1

As everywhere in this folder each contender has all its rounds in one go (bench_sequences.py). torch.nn's own
`vmap(grad(...))` is timed where torch has it, which is for LSTM.
"""

import pytest
import torch
from torch.func import functional_call, grad, vmap

import fastrnn

SAMPLES = 32
SHAPES = [("LSTM", 20, 8, 16), ("LSTM", 50, 32, 64), ("LSTM", 100, 64, 128), ("LSTM", 100, 128, 256)]
SHAPES += [(cell, *sizes) for cell in ("GRU", "RNN") for sizes in ((50, 32, 64), (100, 64, 128))]


def plain(module, batches):
    """Gradients of all weights, batch by batch, by plain autograd."""
    weights = list(module.parameters())
    return lambda: [torch.autograd.grad(module(x)[0].square().sum(), weights) for x in batches]


def mapped(module, samples):
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights, x):
        return functional_call(module, weights, (x,))[0].square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))
    return lambda: gradients(weights, samples)


CONTENDERS = ["mapped", "whole batch", "fastrnn loop", "torch loop"]
RUNS = [(*shape, name) for shape in SHAPES for name in (*CONTENDERS, *["torch mapped"] * (shape[0] == "LSTM"))]


@pytest.mark.parametrize(("cell", "T", "I", "H", "contender"), RUNS)
def bench_per_sample_gradients(benchmark, cell, T, I, H, contender):
    torch.manual_seed(0)
    module = getattr(torch.nn if "torch" in contender else fastrnn, cell)(I, H)
    x = torch.randn(SAMPLES, T, 1, I)
    if "mapped" in contender:
        call = mapped(module, x)
    else:
        call = plain(module, [x.movedim(0, 2).flatten(1, 2)] if contender == "whole batch" else x)
    benchmark.group = f"{cell} T {T}, I {I}, H {H}: gradients of {SAMPLES} samples"
    call()
    benchmark(call)


@pytest.mark.parametrize("contender", ["torch", "fastrnn"])
@pytest.mark.parametrize("B", [8, 32])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def bench_gradient_penalty(benchmark, cell, B, contender):
    T, I, H = 100, 64, 128
    torch.manual_seed(0)
    module = getattr(torch.nn if contender == "torch" else fastrnn, cell)(I, H)
    x = torch.randn(T, B, I).requires_grad_()

    def call():
        (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(module.parameters()), allow_unused=True)

    benchmark.group = f"{cell} B {B}, T {T}, I {I}, H {H}: gradient penalty"
    call()
    benchmark(call)
