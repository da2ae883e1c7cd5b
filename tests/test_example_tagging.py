"""examples/tagging.py: that it runs, that every character has its right tag, and how a long text is put together."""

import argparse
import io
import tokenize
from collections import Counter, defaultdict

import pytest
import torch
from programs import is_whole_png, load, run, table
from sklearn.metrics import f1_score

tagging = load("tagging")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_it_runs(tmp_path):
    done = run("tagging", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    accuracies = [float(cell.rstrip("%")) for cell in table(done.stdout, "all: accuracy")[1:]]
    assert accuracies[0] == 100 and accuracies[3] > accuracies[2] > accuracies[1] > 20
    for name in tagging.TAGS:
        assert all(0 <= float(cell) <= 1 for cell in table(done.stdout, f"{name}: F1")[2:])
    assert [p.name for p in tmp_path.iterdir()] == ["tagging.png"]
    assert is_whole_png(tmp_path / "tagging.png")


@pytest.mark.parametrize("arguments", [["--length", "0"], ["--steps", "x"], ["--output", "nowhere/p.png"]], ids=str)
def test_a_bad_argument_is_named(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        tagging.main(arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_more_files_than_there_are():
    with pytest.raises(SystemExit, match="argument --files: expected at most .* got 100000"):
        tagging.main(["--quick", "--files", "100000"])


# ---------------------------------------------------------------------------------------------------- data

LETTERS = dict(zip("CKN1O.S", tagging.TAGS))
SOURCE, LABELS = zip(
    ("if x1 >= 0x1F:  # if 1\n", "KK.NN.OO.1111O..CCCCCC."),
    ('    s = b\'in\' + """a\n', "....N.O.SSSSS.O.SSSSS"),
    ('# b""" \\\n', "SSSSSS..."),
    ("    or é_1.real, 1.5j\n", "....KK.NNNONNNNO.1111."),
    ("match = None\n", "NNNNN.O.KKKK."),
    ("f'{a} {{b}} {f\"{c} d\"}' + f''\n", "SSSSSSSSSSSSSSSSSSSSSSS.O.SSS."),
)


def test_every_character_has_its_tag():
    found = tagging.tags("".join(SOURCE))
    assert [tagging.TAGS[tag] for tag in found] == [LETTERS[letter] for letter in "".join(LABELS)]


def test_tags_of_real_source():
    """What is between tokens is white space, and a line's first tokens are where they are said to be."""
    source = tagging.sources(4, seed=1)[0]
    found = tagging.tags(source)
    assert {c for c, tag in zip(source, found) if tag == tagging.TAG["space"]} <= set(" \t\n\\")
    lines = source.splitlines(keepends=True)
    names = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            names += 1
            begin = sum(map(len, lines[: token.start[0] - 1])) + token.start[1]
            want = tagging.TAG["keyword" if tagging.keyword.iskeyword(token.string) else "name"]
            assert source[begin : begin + len(token.string)] == token.string
            assert found[begin : begin + len(token.string)] == [want] * len(token.string)
    assert names > 100


def test_the_split_is_by_files_and_targets_are_where_their_characters_are():
    files = [f"x{i} = {i}{i} + y\n" * 20 for i in range(10)]  # every character but the digits has one tag
    data = tagging.Data(files)
    assert data.text == files[0] + files[1]
    train = "".join(files[2:])
    assert len(data.train[0]) == len(data.train[1]) == len(train)
    number = dict(zip(train, data.train[0].tolist()))
    assert 0 not in number.values() and len(set(number.values())) == len(number) == data.characters - 1
    assert data.held_out[0].tolist() == [number.get(c, 0) for c in data.text]
    assert number.get("0", 0) == 0 in data.held_out[0].tolist()  # of the held-out files only
    assert data.held_out[1].tolist() == [t for f in files[:2] for t in tagging.tags(f)]

    rows = dict(
        zip("x= +y\n", [tagging.TAG[name] for name in ("name", "operator", "space", "operator", "name", "space")])
    )
    one_of = {number[c]: {tag} for c, tag in rows.items()}
    digit = {tagging.TAG["name"], tagging.TAG["number"]}
    windows = list(data.batches(3, 5, 31, seed=2))
    assert len(windows) == 3
    for characters, wanted in windows:
        assert characters.shape == wanted.shape == (31, 5)
        text = data.train[0].tolist()
        for b in range(5):
            row = characters[:, b].tolist()
            assert any(text[i : i + 31] == row for i in range(len(text)))
            assert all(t in one_of.get(c, digit) for c, t in zip(row, wanted[:, b].tolist()))


def test_baselines_are_learned_from_the_training_text():
    data = tagging.Data(["a = 1 # é\n" * 3] + ["a1 = 1 + 1\nif a: # a\n  b = 1\n"] * 4)
    most, each = data.baselines().values()
    by_character = defaultdict(Counter)
    for c, tag in zip(*(x.tolist() for x in data.train)):
        by_character[c][tag] += 1
    overall = sum(by_character.values(), Counter())
    assert len(most) == len(each) == len(data.text)
    assert {overall[tag] for tag in set(most.tolist())} == {max(overall.values())}
    assert 0 in data.held_out[0].tolist()
    for c, tag in zip(data.held_out[0].tolist(), each.tolist()):
        assert (by_character[c] if c else overall)[tag] == max((by_character[c] if c else overall).values())


# ---------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("bidirectional", [False, True])
def test_who_sees_what_is_behind(bidirectional):
    torch.manual_seed(0)
    model = tagging.Tagger(20, 8, bidirectional)
    x = torch.randint(1, 20, (30, 3))
    y = x.clone()
    y[17] = 0
    with torch.no_grad():
        changed = (model(x) != model(y)).any(-1).any(-1)
    assert changed[17:].all()
    assert changed[:17].any() == bidirectional


class Edges(torch.nn.Module):
    """Says tag 1 where a character has `reach` others on both sides of it in its window, and 0 elsewhere."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, characters):
        T = len(characters)
        inside = torch.tensor([self.reach <= t < T - self.reach for t in range(T)]).long()
        return torch.nn.functional.one_hot(inside[:, None].expand(characters.shape), 7).float()


class Identity(torch.nn.Module):
    def forward(self, characters):
        return torch.nn.functional.one_hot(characters, 7).float()


@pytest.mark.parametrize("n", [1, 5, 16, 17, 24, 31, 32, 33, 100, 3001])
def test_a_text_is_tagged_whole_and_from_the_middle_of_windows(n):
    text = torch.randint(7, (n,))
    assert torch.equal(tagging.predict(Identity(), text, 16), text)
    inside = tagging.predict(Edges(4), text, 16).tolist()
    assert all(inside[4 : n - 4])
    assert not any(inside[:4] + inside[max(0, n - 4) :])


def test_f1_is_its_definition():
    found, wanted = torch.randint(7, (2, 500))
    found[:200] = wanted[:200]
    found[found == 3] = 2  # a tag that is never said
    want = f1_score(wanted, found, average=None, labels=range(7), zero_division=0)
    assert max(abs(a - b) for a, b in zip(tagging.f1(found, wanted), want, strict=True)) <= 1e-12
    assert tagging.f1(found, wanted)[3] == 0
    assert tagging.accuracy(found, wanted) == sum(a == b for a, b in zip(found.tolist(), wanted.tolist())) / 500


def test_the_pieces_to_show_are_whole_lines_and_the_worst_ones():
    source = "".join(tagging.sources(3, seed=0))
    wanted = torch.tensor(tagging.tags(source))
    found = wanted.clone()
    found[source.index("\n", 2000) + 1 :][:30] += 1  # the only errors
    (begin, end, _), (worst, worst_end, headline) = tagging.pieces(source, found, wanted)
    for first, last, count in ((begin, end, tagging.MIXED), (worst, worst_end, tagging.WORST)):
        assert first == 0 or source[first - 1] == "\n"
        assert source[last - 1] == "\n"
        lines = source[first:last].splitlines(keepends=True)
        assert len(lines) == count and max(map(len, lines)) <= tagging.COLUMNS
    assert (found != wanted)[worst:worst_end].sum() == 30
    assert f"({1 - 30 / (worst_end - worst):.1%} right)" in headline
    assert {"comment", "keyword", "string"} <= {tagging.TAGS[tag] for tag in wanted[begin:end].tolist()}


def test_a_model_no_better_than_its_baselines_is_a_fault(capsys):
    wanted = torch.randint(7, (300,))
    args = argparse.Namespace(one_way=False, hidden=1, batch=1, length=1, steps=1, seed=0)
    worse = wanted.clone()
    worse[:100] = (wanted[:100] + 1) % 7
    for found, good in ((worse, False), (wanted, True)):
        results = {"the most common tag": torch.zeros_like(wanted), "each": worse, "GRU": found}
        assert tagging.report(results, wanted, args) is good
        assert ("FAULT" in capsys.readouterr().out) is not good


def test_the_same_seed_gives_the_same_losses():
    data = tagging.Data(["a1 = 1 + 1\nif a: # a\n  b = 1\n" * 5] * 5)
    args = argparse.Namespace(steps=4, batch=3, length=20, seed=1)
    losses = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        losses.append(tagging.train(tagging.Tagger(data.characters, 8, True), data, args))
    assert losses[0] == losses[1] != losses[2]
