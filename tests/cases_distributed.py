"""What two processes do together, for test_distributed.py, which runs pytest on this file in both under torchrun: the
same cases in the same order, on gloo. Each compares DDP or FSDP2 with one process on the whole batch.

float32 by the tolerance rule, with one process in the place of torch and float64 as the truth; float64 to 1e-12, which
is what sums in another order leave of 1e-16 after a few steps.
"""

import contextlib
import copy
import datetime
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import normal, tensors_in
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import fastrnn

T, I, H = 9, 5, 12
CLOSE = 1e-12
FULL = StateDictOptions(full_state_dict=True)


@pytest.fixture(scope="module", autouse=True)
def group():
    """Two processes. A collective that the other does not come to ends in an error, and does not wait for ever."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    assert dist.get_world_size() == 2
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh(group):
    return init_device_mesh("cpu", (2,))


class Model(nn.Module):
    """RNNs of every kind on top of each other, and a learned state to start from after a reset."""

    def __init__(self, module=fastrnn, extended=False, tied=False):
        super().__init__()
        self.lstm = module.LSTM(I, H, 2, proj_size=7)
        self.gru = module.GRU(7, H, bidirectional=True)
        self.rnn = module.RNN(2 * H, H, 2)
        self.cell = module.GRUCell(H, 4)
        self.begin = nn.Parameter(0.1 * torch.ones(2, 1, H)) if extended else None
        if tied:
            self.rnn.weight_hh_l1 = self.rnn.weight_hh_l0

    def forward(self, x, lengths=None, reset=None):
        more = {} if lengths is None and reset is None else dict(lengths=lengths, reset=reset)
        y = self.gru(self.lstm(x, **more)[0], **more)[0]
        if self.begin is not None:
            more["reset_state"] = self.begin
        y = self.rnn(y, **more)[0]
        return self.cell(y.sum(0))


def batch(rows, step, dtype, extended=False):
    """(arguments of the model, target), rows last or first by argument."""
    x, y = normal(T, rows, I, dtype=dtype, seed=10 * step), normal(rows, 4, dtype=dtype, seed=10 * step + 1)
    if not extended:
        return (x,), y
    g = torch.Generator().manual_seed(step)
    lengths = torch.randint(T + 1, (rows,), generator=g)
    return (x, lengths, torch.rand(T, rows, generator=g) < 0.3), y


def part(arguments, target):
    """This rank's rows: of 7 the first has 4, of 1 the second none."""
    rank, mine = dist.get_rank(), []
    for value in arguments:
        mine.append(value.tensor_split(2, dim=0 if value.dim() == 1 else 1)[rank])
    return tuple(mine), target.tensor_split(2)[rank]


def whole(tensor):
    """All of it, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def training(model, parallel, rows, dtype, steps=3):
    """Losses, the gradients of the first step, and the parameters after a few steps of SGD.

    parallel: what is called; `model` itself trains on the whole batch.
    """
    names = list(model.named_parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    found = {}
    for step in range(steps):
        arguments, target = batch(rows, step, dtype, model.begin is not None)
        size, ranks = target.numel(), 1
        if parallel is not model:
            (arguments, target), ranks = part(arguments, target), 2
        loss = ranks * mse_loss(parallel(*arguments), target, reduction="sum") / size
        optimiser.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        if parallel is not model:
            dist.all_reduce(total)
        found[f"loss {step}"] = total / ranks
        if step == 0:
            found |= {f"gradient {name}": whole(p.grad) for name, p in names if p.grad is not None}
        optimiser.step()
    return found | {f"parameter {name}": whole(p) for name, p in names}


def close(found, expected):
    """float64, by the norm of each tensor."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        apart = (found[name] - want).norm() / want.norm().clamp_min(1e-300)
        assert apart <= CLOSE, f"{name}: {apart.item():.1e} apart, expected at most {CLOSE:g}"
    agree(found)


def agree(found):
    """Both ranks have the same bits."""
    for name, mine in found.items():
        theirs = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine.contiguous())
        assert theirs[0].equal(theirs[1]), name


def same_as_one_process(wrap, make=Model, rows=7, **kwargs):
    """In float64. wrap(model) -> what is called. Returns what training found."""
    torch.manual_seed(0)
    model = make().double()
    other = copy.deepcopy(model)
    found = training(model, wrap(model), rows, torch.float64, **kwargs)
    close(found, training(other, other, rows, torch.float64, **kwargs))
    losses = [found[name] for name in found if name.startswith("loss")]
    assert all(a != b for a, b in zip(losses, losses[1:]))
    return found


def same_by_the_rule(rule, wrap):
    """In float32, with everything at once."""

    def draw(n):
        torch.manual_seed(n)
        model = Model(extended=True)
        exact, other = copy.deepcopy(model).double(), copy.deepcopy(model)
        ours = training(model, wrap(model), 7, torch.float32)
        agree(ours)
        return ours, training(other, other, 7, torch.float32), training(exact, exact, 7, torch.float64)

    rule.check(draw, torch.float32)


VARIANTS = {
    "tied": lambda: Model(tied=True),
    "converted": lambda: fastrnn.accelerate(Model(nn)),
    "ragged with resets": lambda: Model(extended=True),
    "plain": Model,
}


# ---------------------------------------------------------------------------------------------------- DDP


@pytest.mark.parametrize("variant", VARIANTS)
def test_ddp(variant):
    same_as_one_process(DistributedDataParallel, VARIANTS[variant])


@pytest.mark.parametrize("variant", ["plain", "ragged with resets"])
def test_ddp_where_a_rank_has_no_rows(variant):
    same_as_one_process(DistributedDataParallel, VARIANTS[variant], rows=1)


def test_ddp_in_float32(rule):
    same_by_the_rule(rule, DistributedDataParallel)


@pytest.mark.parametrize(
    "options",
    [
        dict(static_graph=True),
        dict(gradient_as_bucket_view=True, bucket_cap_mb=0.002),
        dict(find_unused_parameters=True),
        dict(static_graph=True, gradient_as_bucket_view=True),
    ],
    ids=str,
)
def test_ddps_options(options):
    same_as_one_process(lambda model: DistributedDataParallel(model, **options))


def test_ddp_finds_layers_that_are_not_used():
    class Partly(Model):
        def forward(self, x):
            return self.cell(self.gru(self.lstm(x)[0])[0].sum(0)[:, :H])

    wrap = lambda model: DistributedDataParallel(model, find_unused_parameters=True)  # noqa: E731
    found = same_as_one_process(wrap, Partly)
    assert "gradient lstm.weight_hr_l1" in found and "gradient rnn.weight_ih_l0" not in found
    lonely = DistributedDataParallel(Partly().double())
    arguments, _ = batch(4, 0, torch.float64)
    lonely(*arguments).sum().backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        lonely(*arguments)


def test_hooks_see_every_gradient_once():
    seen = []

    def mean(state, bucket):
        seen.append([id(p) for p in bucket.parameters()])
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    def wrap(model):
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.002)
        parallel.register_comm_hook(None, mean)
        wanted.extend(map(id, model.parameters()))
        return parallel

    wanted = []
    same_as_one_process(wrap, steps=2)
    assert len(seen) > 4
    assert sorted(sum(seen, [])) == sorted(2 * wanted)


def test_accumulation_without_synchronisation():
    torch.manual_seed(4)
    model = Model().double()
    other = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    batches = [batch(6, n, torch.float64) for n in range(3)]
    for n, given in enumerate(batches):
        arguments, target = part(*given)
        with parallel.no_sync() if n < 2 else contextlib.nullcontext():
            mse_loss(parallel(*arguments), target).backward()
        mse_loss(other(*given[0]), given[1]).backward()
        if n == 1:  # so far each rank has its own
            both = [torch.empty_like(model.lstm.weight_ih_l0) for _ in range(2)]
            dist.all_gather(both, model.lstm.weight_ih_l0.grad)
            assert not both[0].equal(both[1])
    grads = {name: p.grad for name, p in model.named_parameters()}
    close(grads, {name: p.grad for name, p in other.named_parameters()})


def test_join_of_unequal_numbers_of_batches():
    """The first rank has three batches, the second one: it shadows the rest, and adds nothing to the mean."""
    torch.manual_seed(5)
    model = Model().double()
    other = copy.deepcopy(model)
    parallel, rank = DistributedDataParallel(model), dist.get_rank()
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, other)]
    with parallel.join():
        for n in range(1 if rank else 3):
            (x,), y = batch(4 + rank, 2 * n + rank, torch.float64)
            optimisers[0].zero_grad()
            mse_loss(parallel(x), y).backward()
            optimisers[0].step()
    for n in range(3):
        optimisers[1].zero_grad()
        for r in range(2 if n == 0 else 1):
            (x,), y = batch(4 + r, 2 * n + r, torch.float64)
            (mse_loss(other(x), y) / 2).backward()
        optimisers[1].step()
    found = {name: p.detach() for name, p in model.named_parameters()}
    close(found, {name: p.detach() for name, p in other.named_parameters()})


def test_ddp_gives_every_rank_the_first_ones_weights_and_frozen_modules_notice():
    x = normal(T, 3, I)
    torch.manual_seed(6)
    expected = fastrnn.LSTM(I, H, 2).eval()(x)[0]
    torch.manual_seed(6 + dist.get_rank())
    lstm = fastrnn.LSTM(I, H, 2).eval().freeze()
    parallel = DistributedDataParallel(lstm)
    with torch.no_grad():
        assert parallel(x)[0].equal(expected)


# ---------------------------------------------------------------------------------------------------- FSDP2


def test_a_probe_sees_the_mean_of_all_ranks_gradients(mesh):
    """DDP's are reduced at the end of the backward pass; of a shard, each rank sees its own part. The steps are those
    of this rank's rows."""
    torch.manual_seed(0)
    alone = Model().double()
    for way in ("ddp", "fsdp"):
        model = copy.deepcopy(alone)
        parallel = DistributedDataParallel(model) if way == "ddp" else sharded(model, mesh)
        arguments, target = part(*batch(7, 0, torch.float64))
        with fastrnn.probe(parallel) as probe:
            mse_loss(parallel(*arguments), target).backward()
        found = {name.removeprefix("module."): norms[0] for name, norms in probe.weights().items()}
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys() and len(found) > 10
        for name, grad in expected.items():
            here = grad.to_local() if isinstance(grad, DTensor) else grad
            assert abs(found[name] - here.norm().item()) <= CLOSE * here.norm().item(), name
        assert probe.trained == 1 and len(probe.layers()) == 2 + 2 + 2 + 1
        assert all(int(layer.last.rows[0]) == target.size(0) for layer in probe.layers())


def sharded(model, mesh, **options):
    """Each RNN by itself, and the root with what is left."""
    for module in model.children():
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


class Called:
    """A model that trains under another name: `training` tells by it that there is a team."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *arguments):
        return self.model(*arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp(mesh, variant):
    same_as_one_process(lambda model: Called(sharded(model, mesh)), VARIANTS[variant])


def test_fsdp_where_a_rank_has_no_rows(mesh):
    same_as_one_process(lambda model: Called(sharded(model, mesh)), rows=1)


def test_fsdp_that_keeps_weights_whole_until_backward(mesh):
    same_as_one_process(lambda model: Called(sharded(model, mesh, reshard_after_forward=False)))


def test_fsdp_in_float32(rule, mesh):
    same_by_the_rule(rule, lambda model: Called(sharded(model, mesh)))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_many_steps_that_are_run_again_in_backward(mesh, way):
    """From weights that FSDP gives back after forward and gathers anew."""
    torch.manual_seed(8)
    lstm = fastrnn.LSTM(I, H, 2, recompute=True).double()
    plain = fastrnn.LSTM(I, H, 2).double()
    plain.load_state_dict(lstm.state_dict())
    parallel = DistributedDataParallel(lstm) if way == "ddp" else fully_shard(lstm, mesh=mesh)
    x = normal(600, 4, I, dtype=torch.float64)
    parallel(x.tensor_split(2, dim=1)[dist.get_rank()])[0].square().sum().backward()
    plain(x)[0].square().sum().backward()
    found = {name: 2 * whole(p.grad) for name, p in lstm.named_parameters()}
    close(found, {name: p.grad for name, p in plain.named_parameters()})


def test_outputs_of_shards_may_be_changed_in_place(mesh):
    """Though FSDP hangs what gathers the weights for backward on them: it warns where they are views."""
    for kind in ("RNN", "LSTM", "GRU"):
        torch.manual_seed(14)
        plain = getattr(fastrnn, kind)(I, H, 2, batch_first=True).double()
        shards, x = fully_shard(copy.deepcopy(plain), mesh=mesh), normal(4, T, I, dtype=torch.float64)
        for module in (shards, plain):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
                output = module(x)[0]
            output.relu_().square().sum().backward()
        found, expected = ({n: whole(p.grad) for n, p in m.named_parameters()} for m in (shards, plain))
        close(found, expected)


def test_weights_are_whole_within_forward_and_sharded_outside(mesh):
    model = sharded(Model(), mesh)
    lstm, kinds = model.lstm, []

    def look(module, arguments, output=None):
        kinds.append(({type(p) for p in module._parameters.values()}, {type(p) for p in module._flat_weights}))
        assert module.weight_ih_l1 is module._flat_weights[module._flat_weights_names.index("weight_ih_l1")]
        assert module.weight_ih_l1.shape == (4 * H, 7)

    forward = lstm.forward
    lstm.forward = lambda *a, **k: (look(lstm, a), forward(*a, **k))[1]
    look(lstm, ())
    loss = model(*batch(3, 0, torch.float32)[0]).sum()
    look(lstm, ())
    loss.backward()
    look(lstm, ())
    whole_ones, shards = ({nn.Parameter},) * 2, ({DTensor},) * 2
    assert kinds == [shards, whole_ones, shards, shards]
    assert lstm.weight_ih_l1.to_local().shape == (2 * H, 7)
    lstm.flatten_parameters()
    assert [w.data_ptr() for w in lstm._flat_weights] == [w.data_ptr() for w in lstm.parameters()]
    assert fastrnn.explain(lstm, *batch(3, 0, torch.float32)[0]).path == "torch"
    lstm.unshard()
    assert fastrnn.explain(lstm, *batch(3, 0, torch.float32)[0]).path == "fastrnn cpu kernel"


def test_fsdp_in_bfloat16(rule, mesh):
    """Weights and activations in bfloat16, master weights and sums of gradients in float32: as torch.nn's."""

    def draw(n):
        torch.manual_seed(n)
        exact = Model(nn).bfloat16().double()
        results = []
        for module in (fastrnn, nn):
            model = Model(module)
            model.load_state_dict(exact.state_dict())
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
            inner = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for child in model.children():
                fully_shard(child, mesh=mesh, mp_policy=inner)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            dtypes = set()
            note = lambda m, i, output, d=dtypes: d.update(t.dtype for t in tensors_in(output))  # noqa: E731
            for child in model.children():
                child.register_forward_hook(note)
            found = training(model, Called(model), 6, torch.float32, steps=1)
            assert dtypes == {torch.bfloat16}
            assert all(t.dtype == torch.float32 for t in found.values())
            results.append({name: t.bfloat16() for name, t in found.items() if not name.startswith("parameter")})
        found = training(exact, exact, 6, torch.float64, steps=1)
        return *results, {name: t for name, t in found.items() if not name.startswith("parameter")}

    rule.check(draw, torch.bfloat16)


def test_state_dicts(mesh, tmp_path):
    """Sharded and full, out and in; the full one is what one process has, torch.nn's too."""
    torch.manual_seed(9)
    plain = Model()
    model = sharded(copy.deepcopy(plain), mesh)
    arguments, target = batch(6, 0, torch.float32)

    full = get_model_state_dict(model, options=FULL)
    assert list(full) == list(plain.state_dict())
    for module in (fastrnn, nn):
        other = Model(module)
        other.load_state_dict(full)
        assert all(p.equal(q) for p, q in zip(other.parameters(), plain.parameters(), strict=True))

    paths = [str(tmp_path)]
    dist.broadcast_object_list(paths)
    shards = model.state_dict()
    assert all(isinstance(t, DTensor) for t in shards.values())
    dcp.save(shards, checkpoint_id=f"{paths[0]}/saved")
    torch.manual_seed(10)
    again = sharded(Model(), mesh)
    wanted = again.state_dict()
    dcp.load(wanted, checkpoint_id=f"{paths[0]}/saved")
    again.load_state_dict(wanted)
    third = sharded(Model(), mesh)
    given = plain.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(third, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    with torch.no_grad():
        expected = plain(*arguments)
        assert all(m(*arguments).equal(expected) for m in (model, again, third))


def test_made_on_the_meta_device(mesh):
    torch.manual_seed(11)
    plain = Model().double()
    with torch.device("meta"):
        model = Model().double()
    sharded(model, mesh).to_empty(device="cpu")
    set_model_state_dict(model, plain.state_dict(), options=FULL)
    close(training(model, Called(model), 7, torch.float64), training(plain, plain, 7, torch.float64))


def test_frozen_and_step(mesh):
    """Shards cannot be frozen. Whole weights can; once they are sharded and changed, what was packed is not used."""
    torch.manual_seed(12)
    plain = fastrnn.LSTM(I, H, 2).eval()
    lstm, x = fully_shard(copy.deepcopy(plain), mesh=mesh), normal(T, 6, I)
    before = fully_shard(copy.deepcopy(plain).freeze(), mesh=mesh)
    with pytest.raises(ValueError, match="weight_ih_l0: expected a plain parameter to freeze, got a DTensor"):
        lstm.freeze()
    register_fsdp_forward_method(lstm, "step")
    with torch.no_grad():
        lstm.unshard()
        lstm.freeze()
        for _ in range(3):
            expected = plain(x)[0]
            assert lstm(x)[0].equal(expected) and before(x)[0].equal(expected)
            states = torch.zeros(2, 2, 6, H).unbind()
            for now in x:
                output, _ = lstm.step(now, states)
            one = torch.zeros(2, 2, 6, H).unbind()
            for now in x:
                other, _ = plain.step(now, one)
            assert output.equal(other)
            for module in (lstm, before):
                module.reshard()
                for p in module.parameters():
                    p.to_local().mul_(1.5)
            for p in plain.parameters():
                p.mul_(1.5)


def test_clipping_and_accumulation_of_shards(mesh):
    torch.manual_seed(13)
    plain = Model().double()
    model = sharded(copy.deepcopy(plain), mesh)
    for n in range(2):
        given = batch(6, n, torch.float64)
        arguments, target = part(*given)
        model.set_requires_gradient_sync(n == 1)
        mse_loss(model(*arguments), target).backward()
        mse_loss(plain(*given[0]), given[1]).backward()
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 1e-3) for m in (model, plain)]
    found, expected = ({n: whole(p.grad) for n, p in m.named_parameters()} for m in (model, plain))
    close(found | {"norm": whole(norms[0])}, expected | {"norm": norms[1]})
