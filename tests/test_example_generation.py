"""examples/generation.py: that it runs, and what could be wrong without anyone noticing: parts that overlap, pixels
that see those to come, painting unlike the forward pass, histograms, bits, what counts as recognised."""

import math

import pytest
import torch
from programs import is_whole_png, load, run, table
from sklearn.datasets import load_digits

example = load("generation")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parts():
    return example.split(seed=4)


def painter(cell, hidden=24):
    torch.manual_seed(1)
    return example.Painter(cell, hidden).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_runs(tmp_path):
    done = run("generation", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    uniform, place, by_class, ours, real = (
        table(done.stdout, name)
        for name in ("uniform", "histogram of place  ", "histogram of place and class", "LSTM, pixel", "real, held out")
    )
    assert uniform[1] == f"{math.log2(17):.3f}"
    assert float(ours[1]) < float(place[1]) - 0.1
    assert float(by_class[1]) < float(place[1])
    assert float(real[1].rstrip("%")) > 95 > 20 > float(uniform[2].rstrip("%"))  # real digits have no bits
    assert float(ours[3]) < float(uniform[3])
    assert [p.name for p in tmp_path.iterdir()] == ["generation.png"]
    assert is_whole_png(tmp_path / "generation.png")


def test_what_has_learned_nothing_is_a_fault(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "PAINTED", 10)
    arguments = ["--quick", "--epochs", "1", "--hidden", "1", "--cell", "gru", "--output", str(tmp_path / "p.png")]
    assert example.main(arguments) == 1
    assert "\nFAULT: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "nan", "-1", "inf", "warm"])
def test_a_bad_temperature_is_named(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main([f"--temperature={text}"])
    assert stopped.value.code == 2
    assert "argument --temperature: expected a number from 0.01 to 100, got" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- data


def test_the_parts_are_all_digits_once(parts):
    """Two of the real digits are the same pixel for pixel, if any: compare them as a sorted list, with their labels."""
    pixels, labels = load_digits(return_X_y=True)
    want = sorted([int(c), *map(int, digit)] for digit, c in zip(pixels, labels))
    found = sorted([c.item(), *digit.tolist()] for part in parts for digit, c in zip(part.pixels.T, part.labels))
    assert found == want
    assert [len(part) for part in parts] == [1197, 240, 360]
    assert len(example.split(seed=4)[2]) == 360 and torch.equal(example.split(seed=4)[2].labels, parts[2].labels)
    assert not torch.equal(example.split(seed=5)[2].labels, parts[2].labels)


def test_a_part_of_a_part(parts):
    rows = torch.tensor([5, 2])
    part = parts[0][rows]
    assert torch.equal(part.pixels[:, 1], parts[0].pixels[:, 2])
    assert part.labels.tolist() == [parts[0].labels[5].item(), parts[0].labels[2].item()]


# ---------------------------------------------------------------------------------------------------- painter


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_pixel_knows_those_before_it_and_the_label_only(cell, parts):
    model, few = painter(cell), parts[0][torch.arange(5)]
    with torch.no_grad():
        logits = model(few.pixels, few.labels)
        changed = few.pixels.clone()
        changed[20] = (changed[20] + 8) % 17
        other = model(changed, few.labels)
        another = model(few.pixels, (few.labels + 1) % 10)
    assert torch.equal(logits[:21], other[:21])
    assert ((logits[21] - other[21]).abs().amax(-1) > 1e-4).all()
    assert ((logits[0] - another[0]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_painting_is_the_forward_pass(cell):
    """At a temperature near zero every pixel is the one that forward finds most likely after those before it."""
    model, labels = painter(cell), torch.arange(10)
    with torch.no_grad():
        model.linear.weight.mul_(20)
        painted = model.paint(labels, 1e-4, generator())
        logits = model(painted, labels)
    assert painted.unique(dim=1).size(1) == 10
    assert torch.equal(painted, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_levels_are_drawn_with_their_probabilities(temperature):
    model = painter("lstm")
    p = torch.linspace(1, 17, 17, dtype=torch.float64)
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.copy_(p.log())
    drawn = model.paint(torch.zeros(500, dtype=torch.long), temperature, generator(7)).flatten().bincount(minlength=17)
    want = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    n = drawn.sum().item()
    assert n == 500 * 64
    assert ((drawn / n - want).abs() < 5 * (want * (1 - want) / n).sqrt()).all()


def test_bits_are_their_definition(parts):
    model, few = painter("gru"), parts[1][torch.arange(7)]
    with torch.no_grad():
        p = model(few.pixels, few.labels).double().softmax(-1)
    total = -sum(math.log2(p[t, b, few.pixels[t, b]].item()) for t in range(64) for b in range(7))
    assert model.train().bits(few) == pytest.approx(total / (64 * 7), rel=1e-6)  # without dropout
    assert not model.training


# ---------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("by_class", [False, True])
def test_histograms_are_counted(by_class, parts):
    train, validation, held_out = parts
    found = example.Histogram(train, validation, by_class)
    bits = {}
    for a in example.PSEUDO_COUNTS:
        p = torch.empty(64, 10, 17, dtype=torch.float64)
        for c in range(10):
            chosen = train.pixels[:, train.labels == c] if by_class else train.pixels
            for t in range(64):
                counts = chosen[t].bincount(minlength=17).double() + a
                p[t, c] = counts / counts.sum()
        scores = [
            -p.log2()[torch.arange(64)[:, None], part.labels, part.pixels].mean() for part in (validation, held_out)
        ]
        bits[a] = [score.item() for score in scores]
    want = min(bits.values())  # the least of the validation part
    assert found.bits(validation) == pytest.approx(want[0], rel=1e-12)
    assert found.bits(held_out) == pytest.approx(want[1], rel=1e-12)
    labels = torch.full((4000,), 3)
    drawn = found.paint(labels, 1.0, generator())
    p = found.logits[:, 3].exp()
    for t in (0, 20, 63):
        share = drawn[t].bincount(minlength=17) / 4000
        assert ((share - p[t]).abs() < 5 * (p[t] * (1 - p[t]) / 4000).sqrt() + 1e-3).all()


def test_what_is_recognised(parts):
    train = parts[0]
    few = train[torch.arange(50)]
    assert example.recognised(few.pixels, few.labels, train) == (1.0, 0.0)
    assert example.recognised(few.pixels, (few.labels + 1) % 10, train) == (0.0, 0.0)
    moved = few.pixels.clone()
    moved[0] += torch.where(torch.arange(50) < 25, 3, 0)  # the first pixel is 0 in nearly all digits
    share, distance = example.recognised(moved, few.labels, train)
    assert share == 1.0
    assert distance == pytest.approx(1.5, abs=1e-6)


def test_the_mosaic_shows_every_class_in_its_column(parts):
    held_out = parts[2]
    picture = example.mosaic(held_out.pixels, held_out.labels)
    assert picture.shape == (89, 89)
    for c, i in [(0, 0), (3, 7), (9, 9)]:
        digit = held_out.pixels[:, held_out.labels == c][:, i].view(8, 8)
        assert torch.equal(picture[9 * i : 9 * i + 8, 9 * c : 9 * c + 8].long(), digit)
