"""What a fastrnn.probe says of its figures in words (diagnosis.py), pictures, dictionaries and TensorBoard."""

import json
import math

import pytest
import torch
from conftest import KINDS, build
from programs import is_whole_png
from torch import nn

import fastrnn
from fastrnn import diagnosis


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(2)


# ------------------------------------------------------------------------------------------------------- in words


def many_to_one(layer, T=200, steps=6, B=8, scale=1.0):
    """A probe of a layer that is to say at the end what came first. Its weights stay as they are."""
    head = nn.Linear(layer.hidden_size, 1)
    optimiser = torch.optim.SGD([*layer.parameters(), *head.parameters()], 0.0)
    with fastrnn.probe(nn.ModuleDict({"rnn": layer})) as probe:
        for _ in range(steps):
            x = scale * torch.randn(T, B, layer.input_size)
            loss = (head(layer(x)[0][-1]) - x[0, :, :1]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return probe


def kinds(probe):
    return {finding.kind for finding in probe.findings()}


def test_a_vanilla_rnn_vanishes():
    probe = many_to_one(fastrnn.RNN(4, 32))
    assert kinds(probe) == {"vanishing"}
    text = probe.summary()
    assert "vanishing; try LSTM or GRU, orthogonal recurrent weights" in text
    assert "in rnn layer 0" in text and "exploding" not in text and "healthy" not in text
    norms = probe.layers()[0].last.h_grad
    assert norms[0] < 1e-20 * norms[-1]


def test_scaled_weights_explode():
    layer = fastrnn.RNN(4, 128)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(3)
    probe = many_to_one(layer, scale=0.1)
    assert kinds(probe) == {"exploding"}
    text = probe.summary()
    assert "gradients grow by" in text and "clip_grad_norm_" in text
    assert "vanishing" not in text and "healthy" not in text
    norms = probe.layers()[0].last.h_grad
    assert norms[0] > 1e3 * norms[-1]


def test_an_lstm_with_a_forget_bias_is_healthy():
    layer = fastrnn.LSTM(4, 32)
    with torch.no_grad():
        layer.bias_hh_l0[32:64] = 5
    probe = many_to_one(layer)
    assert probe.findings() == []
    text = probe.summary()
    assert "healthy" in text and "vanishing" not in text and "exploding" not in text
    record = probe.layers()[0].last
    left = diagnosis.flow(record)
    assert len(left) == 200 and -2 < left[-1] < 2
    assert left[-1] == pytest.approx(math.log10(record.c_grad[0] / record.c_grad[-1]), abs=1e-6)


def test_the_flow_does_not_depend_on_where_losses_are():
    """Of an LSTM that keeps nearly everything, whatever way losses are placed."""
    layer = fastrnn.LSTM(4, 32, num_layers=2)
    with torch.no_grad():
        for k in range(2):
            getattr(layer, f"bias_hh_l{k}")[32:64] = 7
    found = []
    for where in (slice(-1, None), slice(None), slice(None, None, 10)):
        with fastrnn.probe(layer) as probe:
            output = layer(torch.randn(200, 16, 4))[0][where]
            (output * torch.randn_like(output)).sum().backward()
        found.append([diagnosis.flow(each.last)[-1] for each in probe.layers()])
    assert all(abs(value) < diagnosis.LIMIT for values in found for value in values), found
    assert all(max(values) - min(values) < 2 for values in zip(*found)), found


@pytest.mark.parametrize("form", ["dense", "lengths", "packed", "slow"])
def test_resets_are_no_vanishing(form, monkeypatch):
    """Of an LSTM that keeps nearly everything: where all rows begin again a sequence ends; some of them take nothing
    from the others' flow."""
    if form == "slow":
        monkeypatch.setattr("fastrnn.functional.slow", lambda x: True)
    layer = fastrnn.LSTM(4, 16)
    with torch.no_grad():
        layer.bias_hh_l0[16:32] = 7
    T, B = 60, 12
    x, lengths = torch.randn(T, B, 4), torch.randint(T // 2, T + 1, (B,))
    lengths[3] = T
    some = torch.rand(T, B) < 0.1
    some[0], some[1, 1:] = False, False
    every = torch.zeros(T, B, dtype=torch.bool)
    every[[20, 45]] = True
    found = []
    for reset in (None, some, every):
        with fastrnn.probe(layer) as probe:
            if form == "packed":
                packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
                output = layer(packed, reset=reset)[0].data
            else:
                output = layer(x, reset=reset, lengths=lengths if form == "lengths" else None)[0]
            output.square().sum().backward()
        record = probe.layers()[0].last
        assert kinds(probe) == set(), probe.summary()
        found.append(diagnosis.flow(record))
        running = torch.arange(T)[:, None] < (lengths if form in ("lengths", "packed") else T)
        assert record.cut.tolist() == (torch.zeros(T) if reset is None else (reset & running).sum(1)).tolist()
    assert record.starts.nonzero().flatten().tolist() == [0, 20, 45] and len(found[2]) == 25
    assert len(found[1]) == T and abs(found[0][-1] - found[1][-1]) < 1


def test_padding_past_all_rows_is_no_vanishing():
    """A reverse direction starts from where rows end."""
    layer = fastrnn.GRU(4, 16, bidirectional=True)
    with torch.no_grad():
        for name in ("bias_ih_l0", "bias_ih_l0_reverse"):
            getattr(layer, name)[16:32] = 8
    with fastrnn.probe(layer) as probe:
        layer(torch.randn(30, 3, 4), lengths=torch.tensor([20, 7, 20]))[0].sum().backward()
    assert kinds(probe) == set(), probe.summary()
    assert [len(diagnosis.flow(each.last)) for each in probe.layers()] == [20, 20]


def test_the_length_of_the_flow_is_that_of_the_jacobians():
    """One loss at the end: what is left is the ratio of the gradients' norms."""
    layer = fastrnn.GRU(4, 16).double()
    with fastrnn.probe(layer) as probe:
        layer(torch.randn(20, 1, 4, dtype=torch.float64))[0][-1].sum().backward()
    norms = probe.layers()[0].last.h_grad
    want = (norms / norms[-1]).log10().flip(0)
    assert (torch.tensor(diagnosis.flow(probe.layers()[0].last), dtype=torch.float64) - want).abs().max() < 1e-9


def test_other_findings():
    relu = fastrnn.RNN(4, 16, nonlinearity="relu")
    with torch.no_grad():
        relu.bias_ih_l0.fill_(-100)
    found = many_to_one(relu, T=10)
    assert "ReLU is off in 100% of units and steps" in found.summary() and "saturated" in kinds(found)
    tanh = fastrnn.RNN(4, 16)
    with torch.no_grad():
        tanh.weight_ih_l0.mul_(100)
    assert "saturated" in kinds(many_to_one(tanh, T=10))
    growing = fastrnn.RNN(4, 16, nonlinearity="relu")
    with torch.no_grad():
        growing.weight_hh_l0.copy_(torch.eye(16) * 1.5)
    assert {"exploding", "large states"} <= kinds(many_to_one(growing, T=60))
    lstm = fastrnn.LSTM(4, 16)
    with torch.no_grad():
        lstm.bias_hh_l0[16:32] = -10
    found = many_to_one(lstm, T=10)
    assert {"saturated", "vanishing"} == kinds(found) and "the forget gate f is closed" in found.summary()


def test_what_no_backward_pass_comes_to_is_named():
    model = nn.ModuleDict({"encoder": fastrnn.GRU(4, 16), "decoder": fastrnn.GRU(16, 16), "unused": fastrnn.GRU(1, 1)})
    with fastrnn.probe(model) as probe:
        model["decoder"](model["encoder"](torch.randn(5, 3, 4))[0].detach())[0].sum().backward()
        (finding,) = probe.findings()
        assert (finding.where, finding.kind) == ("encoder", "no gradient")
        assert "\nencoder\n  no gradient arrives in encoder" in probe.summary()
        model["decoder"](model["encoder"](torch.randn(5, 3, 4))[0])[0].sum().backward()
    assert probe.findings() == []


def test_gates_in_words_are_of_rows_that_run():
    layer = fastrnn.GRU(4, 16)
    with torch.no_grad():
        layer.bias_ih_l0[16:32] = 50
    with fastrnn.probe(layer) as probe:
        layer(torch.randn(30, 3, 4), lengths=torch.tensor([20, 7, 3]))[0].sum().backward()
    assert "z 1.00, 0% low, 100% high" in probe.summary()


def test_a_subclass_with_a_forward_of_its_own_is_watched():
    class Last(fastrnn.LSTM):
        def forward(self, x):
            return super().forward(x)[0][-1]

    model = Last(3, 4)
    with fastrnn.probe(model) as probe:
        model(torch.randn(5, 2, 3)).sum().backward()
    assert [len(layer.last) for layer in probe.layers()] == [5]


def test_a_reverse_direction_that_was_read_too_early():
    layer = fastrnn.GRU(4, 16, bidirectional=True)
    with torch.no_grad():
        for name in ("bias_ih_l0", "bias_ih_l0_reverse"):
            getattr(layer, name)[16:32] = 8  # the update gate keeps
    with fastrnn.probe(layer) as probe:
        layer(torch.randn(20, 3, 4))[0][-1].sum().backward()
    (finding,) = probe.findings()
    assert (finding.where, finding.kind) == ("layer 0, reverse", "one step")
    assert "reads the first of 20 steps" in probe.summary() and "take the last state, h_n" in probe.summary()
    with fastrnn.probe(layer) as probe:
        layer(torch.randn(20, 3, 4))[1].sum().backward()
    assert probe.findings() == []


def test_not_finite_numbers_are_named():
    layer = fastrnn.GRU(4, 16)
    x = torch.randn(10, 2, 4)
    x[3] = math.nan
    with fastrnn.probe(layer) as probe:
        layer(x)[0].sum().backward()
    text = probe.summary()
    assert "h is nan at time step 3 of training step 0" in text and "healthy" not in text
    assert json.loads(json.dumps(probe.to_dict()))["findings"][0]["kind"] == "not finite"


def test_what_was_not_finite_once_is_over():
    """As in the first steps of a GradScaler."""
    layer = fastrnn.GRU(4, 16)
    with fastrnn.probe(layer) as probe:
        for step in range(12):
            layer.zero_grad()
            (layer(torch.ones(10, 2, 4))[0].sum() * (math.inf if step == 0 else 1)).backward()
    assert "not finite" not in kinds(probe)
    assert not math.isfinite(probe.weights()["weight_hh_l0"][0])


def test_a_spike_is_named():
    layer = fastrnn.GRU(4, 16)
    with fastrnn.probe(layer) as probe:
        for step in range(12):
            layer.zero_grad()
            (layer(torch.ones(10, 2, 4))[0].sum() * (1e4 if step == 7 else 1)).backward()
    spikes = [finding for finding in probe.findings() if finding.kind == "spike"]
    assert {finding.where for finding in spikes} == {name for name, _ in layer.named_parameters()}
    assert all("in training step 7" in finding.what for finding in spikes)


@pytest.mark.parametrize(
    "log10, text",
    [(-6, "1e-6"), (-6.04, "9e-7"), (-0.58, "0.26"), (0, "1"), (8.477, "3e8"), (2.3, "200"), (-math.inf, "nothing"),
     (-5.0001, "1e-5"), (-3.99, "1e-4")],
)  # fmt: skip
def test_numbers(log10, text):
    assert diagnosis.number(log10) == text


# --------------------------------------------------------------------------------------------------- in other forms


def test_to_dict_and_json(tmp_path):
    probe = many_to_one(fastrnn.LSTM(4, 8, num_layers=2), T=12)
    found = probe.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))
    assert found["trained"] == 6 and found["steps"] == list(range(6))
    first = found["layers"][0]
    assert (first["name"], first["cell"], first["hidden_size"]) == ("rnn layer 0", "lstm", 8)
    assert len(first["history"]) == 6
    record, seen = first["history"][5], probe.layers()[0].last
    assert record["h_grad"] == seen.h_grad.tolist() and record["gates"]["f"]["mean"] == seen.gates["f"].mean.tolist()
    probe.to_json(tmp_path / "probe.json")
    assert json.loads((tmp_path / "probe.json").read_text())["weights"].keys() == found["weights"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_plots(kind, tmp_path):
    probe = many_to_one(build(kind, 4, 8), T=12)
    probe.plot(tmp_path / "probe.png")
    assert is_whole_png(tmp_path / "probe.png")
    assert [p.name for p in tmp_path.iterdir()] == ["probe.png"]


@pytest.mark.filterwarnings("error")
def test_plots_of_one_step_and_of_many_layers(tmp_path):
    from fastrnn import probe_figure

    for layer, T in ((fastrnn.LSTM(2, 3), 1), (fastrnn.RNN(2, 3, num_layers=30), 4)):
        with fastrnn.probe(layer) as probe:
            layer(torch.randn(T, 2, 2))[0].sum().backward()
        figure = probe_figure.figure(probe)
        figure.savefig(tmp_path / "probe.png")
        for axes in figure.axes:
            legend = axes.get_legend()
            assert legend is None or len(legend.get_texts()) <= probe_figure.NAMED_WEIGHTS
            assert T > 1 or all(line.get_marker() == "o" for line in axes.get_lines() if line.get_linestyle() == "-")


def test_plots_show_what_was_seen():
    from fastrnn import probe_figure
    from fastrnn.drawing import new_figure

    layer = fastrnn.LSTM(4, 8, num_layers=3, bidirectional=True)
    with fastrnn.probe(layer) as probe:
        for _ in range(3):
            layer(torch.randn(7, 2, 4))[0].square().sum().backward()
    figure = probe_figure.figure(probe)
    assert "4 of 6 layers" in figure._suptitle.get_text()
    axes = new_figure(4, 3).subplots()
    one = probe.layers()[0]
    probe.draw_flow(axes)
    lines = axes.get_lines()
    assert len(lines) == 12
    assert lines[0].get_ydata().tolist() == one.last.c_grad.flip(0).tolist()
    axes = new_figure(4, 3).subplots()
    probe.draw_gates(axes)
    assert [line.get_label() for line in axes.get_lines()] == list("ifgo")
    assert axes.get_lines()[1].get_ydata().tolist() == one.last.gates["f"].mean.tolist()
    axes = new_figure(4, 3).subplots()
    probe.draw_states(axes)
    assert axes.get_lines()[0].get_ydata().tolist() == (one.last.h / math.sqrt(2)).tolist()
    axes = new_figure(4, 3).subplots()
    probe.draw_heat_map(axes, 0)
    (mesh,) = axes.collections
    want = torch.stack([record.h_grad for record in one.history.values()])
    assert (torch.from_numpy(mesh.get_array().data) - want).abs().max() == 0


def test_a_plot_of_nothing_says_so(tmp_path):
    with fastrnn.probe(fastrnn.GRU(1, 2)) as probe:
        pass
    with pytest.raises(RuntimeError, match="probe: expected at least one backward pass"):
        probe.plot(tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    probe = many_to_one(fastrnn.GRU(4, 8), T=12)
    probe.to_tensorboard(tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    found = [event.value for event in events.Scalars("rnn_layer_0/gradient_norm_largest")]
    want = [record.h_grad.max().item() for record in probe.layers()[0].history.values()]
    assert found == pytest.approx(want, rel=1e-6)
    assert {f"gradient_norm/{name}" for name in probe.weights()} <= set(tags["scalars"])
    assert tags["images"] == ["probe"]
