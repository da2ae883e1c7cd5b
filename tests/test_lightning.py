"""The demo's model, unchanged, in a LightningModule under lightning's Trainer: it does what a plain loop does."""

import warnings
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastrnn
from fastrnn.demo import CharacterModel, Text, read_text

STEPS, BATCH, LENGTH, CLIP = 12, 8, 16, 0.25


class Learner(lightning.LightningModule):
    def __init__(self, module=fastrnn, cell="LSTM", characters=0):
        super().__init__()
        self.save_hyperparameters(ignore="module")
        self.model = CharacterModel(getattr(module, cell), characters, 24, 2)
        self.losses, self.norms, self.dtypes = [], [], set()

    def training_step(self, batch, _):
        loss = self.model.loss(*batch)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=4e-3)


@pytest.fixture(scope="module")
def data():
    """The demo's batches, (input, target), each (T, B)."""
    text = Text(read_text(None, LENGTH), LENGTH)
    get = text.batches(STEPS, BATCH, seed=3)
    return SimpleNamespace(characters=len(text.characters), batches=[get(i) for i in range(STEPS)])


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What deterministic=True sets for the whole process; which torch's own test utilities, where a test imports them,
    forbid but in here."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    cudnn, everywhere = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = cudnn.benchmark, cudnn.deterministic
    torch.set_num_threads(1)
    with torch.backends.__allow_nonbracketed_mutation():
        yield
        cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(everywhere)


def fit(data, learner, ckpt_path=None, **options):
    options = dict(max_epochs=1) | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, deterministic=True, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(learner, DataLoader(data.batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def learner(data, **kwargs):
    torch.manual_seed(5)
    return Learner(characters=data.characters, **kwargs)


def plain_loop(data, model, clip=None):
    """The same by hand."""
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=4e-3), []
    for batch in DataLoader(data.batches, batch_size=None):
        loss = model.loss(*batch)
        optimiser.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("cell, clip", [("LSTM", None), ("GRU", CLIP)])
def test_the_trainer_does_what_a_loop_does(data, cell, clip):
    """The same bits: the same operations in the same order."""
    found, other = (learner(data, cell=cell) for _ in range(2))
    fit(data, found, gradient_clip_val=clip)
    assert found.losses == plain_loop(data, other.model, clip)
    assert len(found.losses) == STEPS and found.losses[-1] < found.losses[0] - 0.3
    assert all(p.equal(q) for p, q in zip(found.parameters(), other.parameters(), strict=True))
    if clip:
        assert max(found.norms) > clip  # it had something to do


def test_losses_are_torchs(data, rule):
    """By the rule: torch.nn's model under the same Trainer, and in float64."""

    def draw(n):
        results = []
        for module, precision in ((fastrnn, "32-true"), (nn, "32-true"), (nn, "64-true")):
            torch.manual_seed(n)
            found = Learner(module, "GRU", data.characters)
            fit(data, found, precision=precision, limit_train_batches=3)
            dtype = torch.float64 if precision == "64-true" else torch.float32
            results.append({f"loss {i}": torch.tensor(loss, dtype=dtype) for i, loss in enumerate(found.losses)})
        return results

    rule.check(draw, torch.float32)


def test_a_checkpoint_goes_on_where_it_was_saved(data, tmp_path):
    whole, first = learner(data), learner(data)
    fit(data, whole, max_epochs=2)
    fit(data, first).save_checkpoint(tmp_path / "half.ckpt")
    second = Learner.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=True)
    assert isinstance(second.model.rnn, fastrnn.LSTM)
    assert all(p.equal(q) for p, q in zip(second.parameters(), first.parameters(), strict=True))
    fit(data, second, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert len(whole.losses) == 2 * STEPS
    assert whole.losses == first.losses + second.losses

    theirs = learner(data, module=nn)  # and torch.nn's model takes it
    theirs.load_state_dict(torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"])
    assert theirs.model.rnn.weight_hh_l1.equal(first.model.rnn.weight_hh_l1)


def test_bfloat16_mixed(data):
    """The Trainer's autocast reaches the kernels: bfloat16 inside, weights in float32, losses near those of float32."""
    exact, mixed, theirs = learner(data), learner(data), learner(data, module=nn)
    mixed.model.rnn.register_forward_hook(lambda m, i, output: mixed.dtypes.add(output[0].dtype))
    fit(data, exact)
    for found in (mixed, theirs):
        fit(data, found, precision="bf16-mixed")
    assert mixed.dtypes == {torch.bfloat16}
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    apart, torchs = (max(abs(a - b) for a, b in zip(found.losses, exact.losses)) for found in (mixed, theirs))
    assert 0 < apart <= 1.5 * torchs + 3e-3 * exact.losses[0]
    assert mixed.losses[-1] < mixed.losses[0] - 0.3
