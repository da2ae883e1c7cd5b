"""Encoder and decoder, sequence to sequence of another length: Hangul, jamo by jamo, to its romanised spelling.

    python examples/encoder_decoder.py                trains, spells words it has not seen, draws a picture
    python examples/encoder_decoder.py --cell gru     the same with GRU
    python examples/encoder_decoder.py --order given  reads a word from its beginning, not from its end

The data are Unicode's, in Python's `unicodedata`: each of the 11,172 syllables decomposes into two or three jamo, and
its name spells it in one to seven letters (HANGUL SYLLABLE HAN). A word is several syllables, drawn at random; some
syllables are held out, and the held-out words have no others. For a person it is a table of 67 rows; the network sees
neither the table nor where syllables begin, and has to get a whole word through one vector c (I. Sutskever, O. Vinyals,
Q. V. Le 2014, "Sequence to Sequence Learning with Neural Networks"; K. Cho et al. 2014, "Learning Phrase
Representations using RNN Encoder-Decoder for Statistical Machine Translation"):

    c = the encoder's state after x_1 ... x_S       s_0 = c
    s_t = RNN(y_{t-1}, s_{t-1})                     p(y_t | y_1 ... y_{t-1}, x) = softmax(W s_t + b)

Training knows y_{t-1} (teacher forcing): both networks are one call each, whatever the lengths in the batch
(`lengths=`). In use y_{t-1} is the decoder's own most likely letter: `decoder.step()`, letter by letter. The encoder
reads words from the end, as Sutskever et al. found better: the first jamo is then nearest to the first letter.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections import Counter
from pathlib import Path
from textwrap import wrap

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastrnn
from fastrnn.drawing import COLOURS, GREY, new_figure, save, smooth, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

CELLS = {"gru": "GRU", "lstm": "LSTM"}
ORDERS = ["given", "reversed"]
FULL = dict(steps=3000, hidden=128, batch=64, syllables=4)
QUICK = dict(steps=250, hidden=64, batch=32, syllables=1)
EMBEDDING, LEARNING_RATE, CLIP = 32, 8e-3, 1.0
HELD_OUT = 0.1  # of the syllables
TEST, BEYOND = 200, 2  # words of each number of syllables; numbers of syllables that training does not have
END, IGNORED = 0, -100  # END is no letter: where a word ends and, before the first letter, that none was written yet


# ---------------------------------------------------------------------------------------------------- data


def jamo(word: str) -> str:
    return unicodedata.normalize("NFD", word)


def spelling(word: str) -> str:
    return "".join(unicodedata.name(syllable).removeprefix("HANGUL SYLLABLE ") for syllable in word)


class Data:
    """Every syllable of Hangul, held out or for training, and words of them as numbers."""

    def __init__(self, order: str, seed: int):
        syllables = [chr(code) for code in range(0xAC00, 0xD7A4)]
        self.generator = torch.Generator().manual_seed(seed)
        shuffled = [syllables[i] for i in torch.randperm(len(syllables), generator=self.generator)]
        split = int(len(shuffled) * HELD_OUT)
        self.held_out, self.train = shuffled[:split], shuffled[split:]
        self.jamo = sorted(set(jamo("".join(syllables))))
        self.letters = sorted(set(spelling("".join(syllables))))
        self.number = {sign: i for i, sign in enumerate(self.jamo)} | {
            sign: i + 1 for i, sign in enumerate(self.letters)
        }
        self.forwards = order == "given"

    def words(self, count: int, pool: list[str], fewest: int, most: int) -> list[str]:
        """Random words of `fewest` to `most` syllables of the pool."""
        sizes = torch.randint(fewest, most + 1, (count,), generator=self.generator)
        picks = iter(torch.randint(len(pool), (int(sizes.sum()),), generator=self.generator).tolist())
        return ["".join(pool[next(picks)] for _ in range(size)) for size in sizes]

    def text(self, numbers: list[int]) -> str:
        """The letters before the first END."""
        end = numbers.index(END) if END in numbers else len(numbers)
        return "".join(self.letters[i - 1] for i in numbers[:end])

    def read(self, words: list[str]) -> tuple[Tensor, Tensor]:
        """(jamo (S, B) padded, their lengths (B,))"""
        rows = [[self.number[sign] for sign in jamo(word)] for word in words]
        rows = rows if self.forwards else [row[::-1] for row in rows]
        return pad_sequence([torch.tensor(row) for row in rows]), torch.tensor([len(row) for row in rows])

    def write(self, words: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(letters before each (T, B), letters to come (T, B), IGNORED past END, lengths with END (B,))"""
        rows = [torch.tensor([self.number[letter] for letter in spelling(word)] + [END]) for word in words]
        following = pad_sequence(rows, padding_value=IGNORED)
        before = torch.cat([torch.full((1, len(rows)), END), following[:-1].clamp(min=END)])
        return before, following, torch.tensor([len(row) for row in rows])


# ---------------------------------------------------------------------------------------------------- model


class EncoderDecoder(nn.Module):
    def __init__(self, cell: str, data: Data, hidden: int):
        super().__init__()
        rnn = getattr(fastrnn, CELLS[cell])
        self.jamo = nn.Embedding(len(data.jamo), EMBEDDING)
        self.letters = nn.Embedding(len(data.letters) + 1, EMBEDDING)
        self.encoder, self.decoder = rnn(EMBEDDING, hidden), rnn(EMBEDDING, hidden)
        self.linear = nn.Linear(hidden, len(data.letters) + 1)

    def forward(self, source: Tensor, source_lengths: Tensor, before: Tensor, lengths: Tensor) -> Tensor:
        """Logits (T, B, letters) of the next letter, the letters before it given."""
        _, state = self.encoder(self.jamo(source), lengths=source_lengths)
        output, _ = self.decoder(self.letters(before), state, lengths=lengths)
        return self.linear(output)

    @torch.no_grad()
    def spell(self, source: Tensor, source_lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Each time the most likely letter, (T, B), and the probabilities they were taken from, (T, B, letters)."""
        _, state = self.encoder(self.jamo(source), lengths=source_lengths)
        self.decoder.freeze()  # the weights stay as they are from step to step: packed once
        letter, written, seen = torch.full_like(source_lengths, END), [], []
        for _ in range(longest):
            output, state = self.decoder.step(self.letters(letter), state)  # over the states before
            seen.append(self.linear(output).softmax(-1))
            letter = seen[-1].argmax(-1)
            written.append(letter)
        return torch.stack(written), torch.stack(seen)


def nats(logits: Tensor, following: Tensor) -> Tensor:
    """The mean over all letters to come, END included."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED)


def train(model: EncoderDecoder, data: Data, args: argparse.Namespace) -> tuple[list[float], list[str]]:
    """(the loss of every step, every word that was seen)"""
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=args.steps)
    losses, seen = [], []
    with Progress({"training": args.steps}) as progress:
        for step in range(args.steps):
            words = data.words(args.batch, data.train, 1, args.syllables)
            before, following, lengths = data.write(words)
            loss = nats(model(*data.read(words), before, lengths), following)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            seen += words
            progress.update("training", step + 1, f"loss {losses[-1]:.3f}")
    return losses, seen


# ---------------------------------------------------------------------------------------------------- baselines


def most_common(seen: list[str], longest: int) -> str:
    """At every place the letter that most of the words have there; it cannot know where to end."""
    places: list[Counter] = [Counter() for _ in range(longest)]
    for word in seen:
        for place, letter in zip(places, spelling(word)):
            place[letter] += 1
    return "".join(place.most_common(1)[0][0] for place in places if place)


def nearest(words: list[str], seen: list[str], data: Data) -> list[str]:
    """Of each word, the seen word with the fewest other jamo, compared place by place from the beginning."""
    known, asked = (pad_sequence([torch.tensor([data.number[j] for j in jamo(w)]) for w in many], padding_value=-1)
                    for many in (seen, words))  # fmt: skip
    longest = max(len(known), len(asked))
    known, asked = (nn.functional.pad(x, (0, 0, 0, longest - len(x)), value=-1).to(torch.int8) for x in (known, asked))
    found = []
    for part in asked.split(100, dim=1):  # bounds the memory
        other = sum((k != a[:, None]).to(torch.int8) for k, a in zip(known, part))
        found += [seen[i] for i in other.argmin(1)]
    return found


# ---------------------------------------------------------------------------------------------------- report


def score(written: list[str], words: list[str]) -> tuple[float, float]:
    """(share of words that are right, share of the words' letters that are right at their place)"""
    right = [spelling(word) for word in words]
    letters = sum(a == b for w, r in zip(written, right) for a, b in zip(w, r))
    return sum(w == r for w, r in zip(written, right)) / len(words), letters / sum(map(len, right))


class Result:
    """What the model and the baselines make of held-out words of one number of syllables."""

    def __init__(self, model: EncoderDecoder, data: Data, seen: list[str], size: int):
        self.size, self.words = size, data.words(TEST, data.held_out, size, size)
        letters, self.probabilities = model.spell(*data.read(self.words), 7 * size + 1)
        self.written = [data.text(row) for row in letters.T.tolist()]
        self.exact, self.letters = score(self.written, self.words)
        guessed = [spelling(word) for word in nearest(self.words, seen, data)]
        self.nearest_exact, self.nearest_letters = score(guessed, self.words)
        self.common_letters = score([most_common(seen, 7 * size)] * TEST, self.words)[1]


def report(results: list[Result], args: argparse.Namespace, heading: str) -> bool:
    rows = []
    for r in results:
        name = f"{r.size} syllable{'s' * (r.size > 1)}" + " (none in training)" * (r.size > args.syllables)
        shares = (r.exact, r.letters, r.nearest_exact, r.nearest_letters, r.common_letters)
        rows.append([name, *(f"{share:.1%}" for share in shares)])
    header = ["held-out words of", "words right", "letters right", "nearest: words", "letters", "most common: letters"]
    print_table(heading, header, rows)
    print(f"Held out:     {TEST} words of each size, all of syllables that training never saw")
    print("Nearest:      the spelling of the training word with the fewest other jamo")
    print("Most common:  at every place the letter that most training words have there")
    for r in results:
        for right, written in list(zip(map(spelling, r.words), r.written))[:2]:
            print(f"Example:      {right} -> {written}" + " (wrong)" * (written != right))
    reach = results[: args.syllables]
    good = all(r.letters > max(r.nearest_letters, r.common_letters) for r in reach)
    if not good:
        print("FAULT: on words as long as those of training, a baseline has more letters right.")
    return good


def names(word: str) -> str:
    """The jamo by name, syllables apart: Hangul's own signs are not in every font."""
    return "  ".join("-".join(unicodedata.name(sign).split()[-1].lower() for sign in jamo(s)) for s in word)


def draw(results: list[Result], losses: list[float], data: Data, args: argparse.Namespace, heading: str, path: Path):
    """The loss, what is right by the length of the word, and what the decoder thought while it spelled two words."""
    figure = new_figure(11, 8.2)
    grid = figure.add_gridspec(2, 6, height_ratios=[1, 1.25])
    curve, bars = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    reach = max(1, len(losses) // 60)
    curve.plot(range(1, len(losses) + 1), smooth(losses, reach), color=COLOURS[0], linewidth=2)
    curve.set_yscale("log")
    curve.set_xlabel("training step")
    curve.set_ylabel("nats per letter")
    title(curve, f"Loss (mean of {2 * reach + 1} steps)")

    sizes = [r.size for r in results]
    bars.plot(sizes, [r.exact for r in results], "o-", color=COLOURS[0], label="words right")
    bars.plot(sizes, [r.letters for r in results], "o--", color=COLOURS[0], label="letters right")
    bars.plot(sizes, [r.nearest_letters for r in results], "s--", color=GREY, label="letters right, nearest word")
    bars.axvspan(args.syllables + 0.5, sizes[-1] + 0.5, color=COLOURS[4], alpha=0.12)
    bars.annotate("longer than\nin training", (args.syllables + 0.6, 1.0), va="top", fontsize=9)
    bars.set_xlim(0.5, sizes[-1] + 0.5)
    bars.set_ylim(-0.03, 1.04)
    bars.set_xticks(sizes)
    bars.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    bars.set_xlabel("syllables of a held-out word")
    bars.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.93))
    title(bars, "Words of syllables not seen in training")
    tidy(curve, bars)

    chosen = results[args.syllables - 1]
    right = [w == spelling(word) for w, word in zip(chosen.written, chosen.words)]
    ordered = sorted(range(TEST), key=right.__getitem__)
    picks = [ordered[-1], ordered[0]]  # one that is right and one that is wrong, where there are both
    heats = [figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3:])]
    for heat, i in zip(heats, picks):
        written = chosen.written[i] + "."
        p = chosen.probabilities[: len(written), i].T.roll(-1, 0)  # END below the letters
        image = heat.imshow(p.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        heat.set_yticks(range(len(p)), [*data.letters, "end"], fontsize=8)
        heat.set_xticks(range(p.size(1)), written[: p.size(1)])
        truth = "right" if right[i] else f"{spelling(chosen.words[i])} is right"
        heat.set_xlabel(f"letters as written ({truth})")
        heat.set_title("\n".join(wrap(names(chosen.words[i]), 54, break_on_hyphens=False)), fontsize=9, loc="left")
    figure.colorbar(image, ax=heats, label="probability of the next letter")
    result = f"{chosen.exact:.1%} of the held-out words of {chosen.size} syllables right"
    figure.suptitle(f"{result}\n{heading}", fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(
        steps="steps of training",
        hidden="hidden size",
        batch="words per batch",
        syllables="syllables of a training word at most",
    )
    top = program("Encoder and decoder: Hangul to its romanised spelling.", sizes, FULL, "encoder_decoder.png")
    top.add_argument("--cell", choices=CELLS, default="lstm", help="which RNN (default: lstm)")
    top.add_argument("--order", choices=ORDERS, default="reversed", help="of reading (default: reversed)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    torch.manual_seed(args.seed)
    data = Data(args.order, args.seed)
    print(
        f"{len(data.train):,} syllables to train on, {len(data.held_out):,} held out; {len(data.jamo)} jamo, "
        f"{len(data.letters)} letters.",
        flush=True,
    )
    model = EncoderDecoder(args.cell, data, args.hidden)
    losses, seen = train(model, data, args)
    results = [Result(model.eval(), data, seen, size) for size in range(1, args.syllables + BEYOND + 1)]
    heading = f"Hangul to letters: {CELLS[args.cell]} of {args.hidden}, {args.steps} steps, seed {args.seed}"
    good = report(results, args, heading)
    draw(results, losses, data, args, heading, args.output)
    print(f"Picture:    {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
