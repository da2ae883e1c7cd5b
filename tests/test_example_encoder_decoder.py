"""examples/encoder_decoder.py: that it runs, and what could be wrong without anyone noticing: held-out syllables in
training, shifted letters, padding in the loss, spelling by step() unlike the forward pass, baselines."""

import unicodedata
from collections import Counter

import pytest
import torch
from programs import is_whole_png, load, run, table
from torch import nn

import fastrnn

example = load("encoder_decoder")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=["given", "reversed"])
def data(request):
    return example.Data(request.param, seed=5)


def model_of(cell, data, hidden=16, seed=3):
    torch.manual_seed(seed)
    return example.EncoderDecoder(cell, data, hidden).eval()


def test_it_runs(tmp_path):
    done = run("encoder_decoder", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    words, letters, nearest_words, nearest, common = (
        float(cell.rstrip("%")) for cell in table(done.stdout, "1 syllable ")[1:]
    )
    assert words > nearest_words + 50
    assert letters > max(nearest, common) + 20
    assert table(done.stdout, "2 syllables (none in training)")
    assert [p.name for p in tmp_path.iterdir()] == ["encoder_decoder.png"]
    assert is_whole_png(tmp_path / "encoder_decoder.png")


def test_what_has_learned_nothing_is_a_fault(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "TEST", 10)
    arguments = ["--quick", "--steps", "2", "--cell", "gru", "--order", "given", "--output", str(tmp_path / "p.png")]
    assert example.main(arguments) == 1
    assert "\nFAULT: " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--order", "sideways"], ["--syllables", "0"], ["--cell", "rnn"]], ids=str)
def test_a_bad_argument_is_named(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- data


def test_words_are_decomposed_and_spelled():
    assert [example.spelling(word) for word in ("한글", "서울", "부산")] == ["HANGEUL", "SEOUL", "BUSAN"]
    assert [unicodedata.name(sign).split()[-1] for sign in example.jamo("서울")] == [
        "SIOS",
        "EO",
        "IEUNG",
        "U",
        "RIEUL",
    ]
    assert example.names("서울") == "sios-eo  ieung-u-rieul"


def test_held_out_words_have_no_syllable_of_training(data):
    train, held_out = set(data.train), set(data.held_out)
    assert not train & held_out
    assert len(train | held_out) == len(data.train) + len(data.held_out) == 11172
    assert len(held_out) == 1117
    words = data.words(500, data.held_out, 2, 4)
    assert set("".join(words)) <= held_out
    assert {len(word) for word in words} == {2, 3, 4}
    assert set("".join(data.words(500, data.train, 1, 1))) <= train


def test_words_as_numbers(data):
    words = ["한글", "가", "서울역"]
    source, source_lengths = data.read(words)
    before, following, lengths = data.write(words)
    assert source_lengths.tolist() == [len(example.jamo(word)) for word in words] == [6, 2, 8]
    assert lengths.tolist() == [8, 3, 10]
    assert (example.END, example.IGNORED) == (0, -100)
    for b, word in enumerate(words):
        signs = "".join(data.jamo[i] for i in source[: source_lengths[b], b])
        assert (signs if data.forwards else signs[::-1]) == example.jamo(word)
        n = int(lengths[b])
        assert following[n - 1 :, b].tolist() == [0] + [-100] * (len(following) - n)
        assert before[0, b] == 0
        assert torch.equal(before[1:n, b], following[: n - 1, b])
        assert "".join(data.letters[i - 1] for i in before[1:n, b]) == example.spelling(word)
        assert data.text(following[:n, b].tolist()) == data.text(before[1:n, b].tolist()) == example.spelling(word)


# ---------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_ragged_batch_is_torch_nn_word_by_word(cell, data, rule):
    """Loss and every gradient: lengths on both sides, the state that is handed over, padding that does not count."""

    def draw(n):
        words = data.words(6, data.train, 1, 4)
        model = model_of(cell, data, seed=n)
        before, following, lengths = data.write(words)
        batch = example.nats(model(*data.read(words), before, lengths), following)
        batch.backward()
        results = [{"loss": batch} | {name: p.grad for name, p in model.named_parameters()}]
        for dtype in (torch.float32, torch.float64):
            other = fastrnn.restore(model_of(cell, data, seed=n)).to(dtype)
            assert type(other.encoder) is type(other.decoder) is getattr(nn, cell.upper())
            total, letters = 0.0, 0
            for word in words:
                source, _ = data.read([word])
                before, following, _ = data.write([word])
                _, state = other.encoder(other.jamo(source))
                logits = other.linear(other.decoder(other.letters(before), state)[0])
                total = total + nn.functional.cross_entropy(logits[:, 0], following[:, 0], reduction="sum")
                letters += len(example.spelling(word)) + 1
            (total / letters).backward()
            results.append({"loss": total / letters} | {name: p.grad for name, p in other.named_parameters()})
        return results

    rule.check(draw, torch.float32)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_logits_do_not_know_the_letters_to_come(cell, data):
    words = ["한글", "서울역"]
    model = model_of(cell, data)
    source = data.read(words)
    before, _, lengths = data.write(words)
    with torch.no_grad():
        logits = model(*source, before, lengths)
        changed = before.clone()
        changed[4] = changed[4] % len(data.letters) + 1
        other = model(*source, changed, lengths)
    assert torch.equal(logits[:4], other[:4])
    assert ((logits[4:8] - other[4:8]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_spelling_by_steps_is_the_forward_pass(cell, data):
    words = data.words(20, data.held_out, 1, 4)
    model, T = model_of(cell, data), 12
    with torch.no_grad():
        model.linear.weight.mul_(20)  # else hardly anything depends on the word
        source = data.read(words)
        written, probabilities = model.spell(*source, T)
        before = torch.cat([torch.zeros(1, 20, dtype=torch.long), written[:-1]])
        want = model(*source, before, torch.full((20,), T)).softmax(-1)
    assert (want[:, 1:] - want[:, :1]).abs().amax((0, 2)).min() > 1e-2  # every word is unlike the first
    assert written.unique().numel() > 3
    assert torch.equal(written, probabilities.argmax(-1))
    assert (probabilities - want).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------- baselines


def test_baselines_are_their_definition(data):
    seen, words = data.words(300, data.train, 1, 3), data.words(40, data.held_out, 1, 4)
    spelled = [example.spelling(word) for word in seen]
    common = example.most_common(seen, 5)
    for place, letter in enumerate(common):
        counts = Counter(s[place] for s in spelled if len(s) > place)
        assert counts[letter] == max(counts.values())
    assert len(common) == 5

    def distance(a, b):
        a, b = example.jamo(a), example.jamo(b)
        return max(len(a), len(b)) - sum(x == y for x, y in zip(a, b))

    for word, found in zip(words, example.nearest(words, seen, data), strict=True):
        assert found in seen
        assert distance(word, found) == min(distance(word, other) for other in seen)
    assert example.nearest(seen[:9], seen, data) == seen[:9]


def test_scores():
    words = ["한", "글", "서울"]  # HAN, GEUL, SEOUL
    assert example.score(["HAN", "GEUL", "SEOUL"], words) == (1, 1)
    assert example.score(["HANS", "EUL", ""], words) == (0, 3 / 12)
    assert example.score(["HAN", "GEEL", "SEOULS"], words) == (1 / 3, 11 / 12)
