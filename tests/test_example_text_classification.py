"""examples/text_classification.py: that it runs, what its passages are, and that nothing leaks into held-out ones."""

import argparse
import ast
import re
from collections import Counter

import pytest
import torch
from programs import is_whole_png, load, run, table

texts = load("text_classification")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data():
    return texts.Data(files=30, length=24, most=60, seed=3)


def percent(cell):
    return float(cell.rstrip("%"))


def test_it_runs(tmp_path):
    done = run("text_classification", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    most, bag, gru, mixed = (
        table(done.stdout, f"{name}  ")
        for name in ("always the most common kind", "bag of words, linear", "GRU", "GRU, words shuffled")
    )
    held_out = int(re.search(r": (\d+) held-out passages$", done.stdout, re.M)[1])
    assert held_out >= 50
    assert percent(gru[1]) > percent(most[1]) + 10
    assert percent(bag[1]) > percent(most[1]) + 10
    assert sorted(map(percent, most[2:])) == [0, 0, 0, 100]  # it names one kind
    assert percent(gru[1]) != percent(mixed[1])
    assert len(re.findall(r"^(right|WRONG): \w+ \d+%, from ", done.stdout, re.M)) == texts.SHOWN
    assert [p.name for p in tmp_path.iterdir()] == ["text_classification.png"]
    assert is_whole_png(tmp_path / "text_classification.png")


@pytest.mark.parametrize("arguments", [["--cell", "conv"], ["--passages", "0"], ["--output", "."]], ids=str)
def test_a_bad_argument_is_named(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        texts.main(arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- data

SOURCE = '''"""About the module."""
# one comment
#   in two lines

x = "# not a comment"  # behind code

class C:
    """About C."""
    def f(self):
        if x:
            raise ValueError(f"expected {x} of them", "not this")
        raise TypeError
        raise KeyError(x)
    async def g(self):
        """About g.

        More."""
'''


def test_what_is_taken_from_a_source():
    comments = [text for kind, text in texts.comments(SOURCE) if kind == "comment" and text]
    assert comments == ["one comment\nin two lines", "behind code"]
    found = [(kind, text) for kind, text in texts.docstrings_and_errors(ast.parse(SOURCE)) if text]
    assert sorted(found) == [
        ("docstring", "About C."),
        ("docstring", "About g.\n\nMore."),
        ("docstring", "About the module."),
        ("error", "expected   of them"),
    ]


def test_passages_are_prose():
    text = (
        "One two, three\nfour.\n\n\nToo short here\n\nThis is a >>> session of Python\n\na = b + c * (d - e) / f(g)\n"
    )
    assert list(texts.paragraphs(text)) == [["One", "two", ",", "three", "four", "."]]


def test_nothing_leaks(data):
    names = [{data.names[i] for i in side} for side in (data.train, data.held_out)]
    assert names[0] and names[1] and not names[0] & names[1]
    assert sorted(data.train + data.held_out) == list(range(len(data.words)))
    assert len(set(data.words)) == len(data.words)  # the same passage is nowhere a second time
    seen = Counter(word for i in data.train for word in data.words[i])
    assert data.vocabulary == 1 + sum(count >= texts.SEEN_TWICE for count in seen.values())
    number = {}
    for words, tokens in zip(data.words, data.tokens):
        for word, token in zip(words, tokens.tolist(), strict=True):
            assert number.setdefault(word, token) == token
            assert (token == 0) == (seen[word] < texts.SEEN_TWICE)
    assert len({token for token in number.values() if token}) == data.vocabulary - 1


def test_labels_are_those_of_their_places(data):
    reference = texts.KINDS.index("reference")
    assert [label == reference for label in data.labels.tolist()] == [n.startswith("topic ") for n in data.names]
    for side, most in ((data.train, 60), (data.held_out, 60 // 8)):
        counts = data.labels[side].bincount(minlength=4)
        assert counts.min() >= 1 and counts.max() <= most
    assert all(4 <= len(words) <= 24 for words in data.words)


def test_an_epoch_is_every_passage_once(data):
    batches = list(data.batches(2, 16, seed=5))
    half = len(batches) // 2
    rows = [
        sorted(tuple(tokens[:n, i].tolist()) for tokens, lengths, _ in part for i, n in enumerate(lengths))
        for part in (batches[:half], batches[half:])
    ]
    assert rows[0] == rows[1] == sorted(tuple(data.tokens[i].tolist()) for i in data.train)
    tokens, lengths, labels = data.batch(data.held_out[:9])
    assert tokens.shape == (lengths.max(), 9)
    assert torch.equal(labels, data.labels[data.held_out[:9]])


def test_shuffling_keeps_the_words(data):
    plain, lengths, labels = data.batch(data.train[:20])
    mixed, mixed_lengths, mixed_labels = data.batch(data.train[:20], torch.Generator().manual_seed(1))
    assert torch.equal(lengths, mixed_lengths) and torch.equal(labels, mixed_labels)
    assert not torch.equal(plain, mixed)
    for i, n in enumerate(lengths):
        assert sorted(plain[:n, i].tolist()) == sorted(mixed[:n, i].tolist())


# ---------------------------------------------------------------------------------------------------- model, baselines


@pytest.mark.parametrize("cell", texts.CELLS)
def test_a_passage_is_classified_as_it_is_alone(cell, data):
    """Neither the padding nor the other rows of its batch count."""
    torch.manual_seed(0)
    model = texts.Classifier(cell, data.vocabulary, 16).eval()
    found = texts.probabilities(model, data)
    for k in range(0, len(data.held_out), 5):
        tokens = data.tokens[data.held_out[k]]
        output, _ = model.rnn(model.embedding(tokens[:, None]))
        alone = model.linear(output[-1, 0]).softmax(-1)
        assert (found[k] - alone).abs().max() <= 1e-6
    assert (found.sum(1) - 1).abs().max() <= 1e-6


def test_counts_are_counts(data):
    counts = data.counts(data.train)
    assert counts.shape == (len(data.train), data.vocabulary)
    for k in range(0, len(data.train), 20):
        want = Counter(data.tokens[data.train[k]].tolist())
        row = counts[k].toarray()[0]
        assert {i: int(n) for i, n in enumerate(row) if n} == want


def test_confusion_and_majority(data):
    said, true = torch.tensor([0, 1, 1, 3, 2, 2]), torch.tensor([0, 1, 0, 3, 2, 3])
    want = torch.zeros(4, 4, dtype=torch.long)
    for s, t in zip(said, true):
        want[t, s] += 1
    assert torch.equal(texts.confusion(said, true), want)
    counts = Counter(data.labels[data.train].tolist())
    said = data.majority()
    assert len(said) == len(data.held_out) and len(set(said.tolist())) == 1
    assert counts[said[0].item()] == max(counts.values())


def test_a_model_that_has_learned_nothing_is_a_fault(data, capsys):
    args = argparse.Namespace(cell="gru", hidden=1, batch=1, epochs=1, seed=0)
    most, true = data.majority(), data.labels[data.held_out]
    for said, good in ((most, False), (true, True)):
        found = torch.nn.functional.one_hot(said, 4).float()
        assert texts.report(data, found, {"always the most common kind": most, "GRU": said}, args) is good
        assert ("FAULT" in capsys.readouterr().out) is not good


def test_the_same_seed_gives_the_same_losses(data):
    args = argparse.Namespace(epochs=1, batch=32, seed=4)
    losses = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        losses.append(texts.train(texts.Classifier("gru", data.vocabulary, 8), data, args))
    assert losses[0] == losses[1] != losses[2]
