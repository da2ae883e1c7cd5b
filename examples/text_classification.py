"""One label for a whole text (many-to-one): which kind of writing about Python is a passage?

    python examples/text_classification.py               trains a GRU, prints what it says of held-out passages
    python examples/text_classification.py --cell lstm   the same with another cell; rnn is the plain one

The passages are English that CPython carries in its standard library, from four kinds of places: paragraphs of
comments, docstrings, texts of errors that are raised, and the language reference (pydoc_data.topics). Whole files are
held out, so no passage is told by its neighbours. The words are read one by one, the state after the last one decides:

    h_t = RNN(embedding(word_t), h_{t-1})        logits = W h_n + b, h_n the state at each row's own last word
    loss = -log softmax(logits)[kind]            rows of different lengths go in together: h_n by lengths=

Two baselines: always the most common kind, and a bag of words, which is the same but blind to order: logistic
regression on how often each word occurs. The model is tried on the held-out passages with their words shuffled, too:
what it loses there is what it has from their order.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import fastrnn
from fastrnn.drawing import OURS, new_figure, save, smooth, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

KINDS = ["comment", "docstring", "error", "reference"]
CELLS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
FULL = dict(epochs=8, hidden=64, batch=32, length=64, passages=2500, files=600)
QUICK = dict(epochs=4, hidden=32, batch=32, length=24, passages=250, files=30)
EMBEDDING, DROPOUT, LEARNING_RATE, CLIP = 64, 0.3, 2e-3, 1.0
HELD_OUT = 0.2  # of the files, and of the topics of the reference
SEEN_TWICE = 2  # a word that training has fewer times is "unknown": it cannot be learned from
NOT_PROSE = {
    "encodings",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "lib-dynload",
}
SHOWN = 6


# ---------------------------------------------------------------------------------------------------- data


def docstrings_and_errors(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every docstring, and the texts in `raise Error("...")`, of f-strings what is constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield "docstring", ast.get_docstring(node) or ""
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            parts = (part.value for part in ast.walk(node.exc.args[0]) if isinstance(part, ast.Constant))
            yield "error", " ".join(part for part in parts if isinstance(part, str))


def comments(source: str) -> Iterator[tuple[str, str]]:
    """Comments in lines that follow each other are one text."""
    block, last = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield "comment", "\n".join(block)
                block = []
            block.append(token.string.lstrip("#: ").rstrip())
            last = token.start[0]
    yield "comment", "\n".join(block)


def paragraphs(text: str) -> Iterator[list[str]]:
    """The words and signs of each paragraph that is prose: four words or more, mostly words, no session of Python."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"\w+|[^\w\s]", paragraph)
        letters = sum(word.isalpha() for word in words)
        if letters >= 4 and 2 * letters > len(words) and ">>>" not in paragraph:
            yield words


def texts(files: int, generator: torch.Generator) -> Iterator[tuple[str, str, str]]:
    """(file or topic, kind, text) of the whole reference, and of modules drawn at random from the standard library."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", "reference", topics[name]
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    names = [name for name in names if not NOT_PROSE & set(name.parts) and not name.parts[0].startswith("config-")]
    for i in torch.randperm(len(names), generator=generator)[:files].tolist():
        source = (root / names[i]).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the escapes in someone else's strings
            tree = ast.parse(source)
        for kind, text in (*comments(source), *docstrings_and_errors(tree)):
            yield names[i].as_posix(), kind, text


def split(names: list[str], generator: torch.Generator) -> set[str]:
    """The names that are held out: a share of the files, and the same share of the topics."""
    held_out = set()
    for part in ([n for n in names if n.startswith("topic ")], [n for n in names if not n.startswith("topic ")]):
        order = torch.randperm(len(part), generator=generator).tolist()
        held_out |= {part[i] for i in order[: int(len(part) * HELD_OUT)]}
    return held_out


class Data:
    """Passages as word numbers with the number of their kind; each is in the data once, wherever it stands again."""

    def __init__(self, files: int, length: int, most: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        rows = {}  # words -> (name, kind): the first place
        for name, kind, text in texts(files, generator):
            for words in paragraphs(text):
                rows.setdefault(tuple(words[:length]), (name, KINDS.index(kind)))
        held_out = split(sorted({name for name, _ in rows.values()}), generator)
        mixed = torch.randperm(len(rows), generator=generator).tolist()
        passages = list(rows)
        taken = Counter()
        self.words, self.names, labels, sides = [], [], [], ([], [])
        for words in (passages[i] for i in mixed):
            name, kind = rows[words]
            side = name in held_out
            if taken[side, kind] < (max(1, most // 8) if side else most):  # so that no kind is far more common
                taken[side, kind] += 1
                sides[side].append(len(self.words))
                self.words.append(words)
                self.names.append(name)
                labels.append(kind)
        self.train, self.held_out = sides
        self.labels = torch.tensor(labels)
        counts = Counter(word for i in self.train for word in self.words[i])
        known = sorted(word for word, count in counts.items() if count >= SEEN_TWICE)
        number = {word: i + 1 for i, word in enumerate(known)}
        self.tokens = [torch.tensor([number.get(word, 0) for word in words]) for words in self.words]
        self.vocabulary = len(known) + 1

    def batch(self, rows: list[int], shuffled: torch.Generator | None = None):
        """(tokens (T, B) padded to the longest, lengths (B,), labels (B,)); a generator shuffles each row's words."""
        tokens = [self.tokens[i] for i in rows]
        if shuffled is not None:
            tokens = [t[torch.randperm(len(t), generator=shuffled)] for t in tokens]
        return pad_sequence(tokens), torch.tensor([len(t) for t in tokens]), self.labels[rows]

    def batches(self, epochs: int, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for begin in range(0, len(order), size):
                yield self.batch([self.train[i] for i in order[begin : begin + size]])

    def counts(self, rows: list[int]):
        """How often each word stands in each row, (rows, vocabulary), sparse."""
        from scipy.sparse import csr_matrix

        place = [(k, int(token)) for k, i in enumerate(rows) for token in self.tokens[i]]
        return csr_matrix(([1.0] * len(place), tuple(zip(*place))), shape=(len(rows), self.vocabulary))

    def majority(self) -> torch.Tensor:
        return self.labels[self.train].bincount().argmax().expand(len(self.held_out))

    def bag_of_words(self) -> torch.Tensor:
        """What logistic regression says of the held-out passages."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=0.3, max_iter=2000).fit(self.counts(self.train), self.labels[self.train].numpy())
        return torch.from_numpy(model.predict(self.counts(self.held_out)))


# ---------------------------------------------------------------------------------------------------- model


class Classifier(nn.Module):
    """Embedding -> RNN -> the state after each row's last word -> logits of the kinds, (B, kinds)."""

    def __init__(self, cell: str, vocabulary: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.rnn = getattr(fastrnn, CELLS[cell])(EMBEDDING, hidden)
        self.linear = nn.Linear(hidden, len(KINDS))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, tokens, lengths):
        _, state = self.rnn(self.dropout(self.embedding(tokens)), lengths=lengths)
        h_n = state[0] if isinstance(state, tuple) else state
        return self.linear(self.dropout(h_n[-1]))


def train(model: Classifier, data: Data, args: argparse.Namespace) -> list[float]:
    steps = args.epochs * -(-len(data.train) // args.batch)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    with Progress({"training": steps}) as progress:
        for tokens, lengths, labels in data.batches(args.epochs, args.batch, args.seed):
            loss = nn.functional.cross_entropy(model(tokens, lengths), labels)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            losses.append(loss.item())
            progress.update("training", len(losses), f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return losses


@torch.no_grad()
def probabilities(model: Classifier, data: Data, shuffled: torch.Generator | None = None) -> torch.Tensor:
    """(held-out passages, kinds)"""
    model.eval()
    parts = (data.held_out[i : i + 256] for i in range(0, len(data.held_out), 256))
    found = torch.cat([model(*data.batch(part, shuffled)[:2]).softmax(-1) for part in parts])
    model.train()
    return found


# ---------------------------------------------------------------------------------------------------- report


def confusion(said: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """(kinds, kinds): how many of the true kind (row) were said to be of each kind (column)."""
    return (true * len(KINDS) + said).bincount(minlength=len(KINDS) ** 2).view(len(KINDS), len(KINDS))


def setting(args: argparse.Namespace) -> str:
    return f"{CELLS[args.cell]} of {args.hidden}, batch {args.batch}, {args.epochs} epochs, seed {args.seed}"


def report(data: Data, found: torch.Tensor, results: dict[str, torch.Tensor], args: argparse.Namespace) -> bool:
    """Prints the figures and a few passages; False if the model is no better than naming one kind."""
    true = data.labels[data.held_out]
    scores = {name: (said == true).double().mean().item() for name, said in results.items()}
    rows = []
    for name, said in results.items():
        table = confusion(said, true)
        recall = [f"{r:.1%}" for r in (table.diagonal() / table.sum(1).clamp(min=1)).tolist()]
        rows.append([name, f"{scores[name]:.1%}", *recall])
    header = ["held-out passages", "right", *(f"of {kind}s" for kind in KINDS)]
    print_table(f"{setting(args)}: {len(true):,} held-out passages", header, rows)

    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(args.seed)).tolist()
    for i in order[:SHOWN]:
        kind = found[i].argmax().item()
        mark = "right" if kind == true[i] else "WRONG"
        passage = " ".join(data.words[data.held_out[i]])
        print(f"{mark}: {KINDS[kind]} {found[i, kind]:.0%}, from {data.names[data.held_out[i]]} ({KINDS[true[i]]})")
        print(f"    {textwrap.shorten(passage, 110, placeholder=' ...')}")
    print()
    good = scores[CELLS[args.cell]] > 1.2 * scores["always the most common kind"]
    if not good:
        print("FAULT: the model is hardly better than naming the most common kind.")
    return good


def draw(data: Data, losses: list[float], results: dict[str, torch.Tensor], args: argparse.Namespace, path: Path):
    """How often each kind is taken for each; the loss; all ways of telling side by side."""
    figure = new_figure(11, 4.8)
    grid = figure.add_gridspec(2, 2, width_ratios=[1, 1.25])
    matrix, curve, bars = (figure.add_subplot(cell) for cell in (grid[:, 0], grid[0, 1], grid[1, 1]))
    true = data.labels[data.held_out]

    table = confusion(results[CELLS[args.cell]], true).double()
    share = table / table.sum(1, keepdim=True).clamp(min=1)
    matrix.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i in range(len(KINDS)):
        for j in range(len(KINDS)):
            colour = "white" if share[i, j] > 0.5 else "#212529"
            matrix.text(j, i, f"{share[i, j]:.0%}\n{table[i, j]:.0f}", ha="center", va="center", color=colour)
    matrix.set_xticks(range(len(KINDS)), KINDS)
    matrix.set_yticks(range(len(KINDS)), KINDS, rotation=90, va="center")
    matrix.set_xlabel(f"what the {CELLS[args.cell]} says")
    matrix.set_ylabel("what it is")
    matrix.spines[:].set_visible(False)
    title(matrix, "Held-out passages: share and number")

    epochs = [args.epochs * (i + 1) / len(losses) for i in range(len(losses))]
    curve.plot(epochs, losses, color=OURS, alpha=0.25, linewidth=0.7)
    curve.plot(epochs, smooth(losses, len(losses) // 60), color=OURS, linewidth=2)
    curve.set_xlim(0, args.epochs)
    curve.set_ylim(bottom=0)
    curve.set_xlabel("epoch")
    curve.set_ylabel("loss, nats")
    title(curve, "Learning (training loss)")

    scores = [(said == true).double().mean().item() for said in results.values()]
    drawn = bars.barh(range(len(scores)), scores, color=[OURS if n == CELLS[args.cell] else "#ced4da" for n in results])
    bars.bar_label(drawn, [f" {score:.1%}" for score in scores])
    bars.set_yticks(range(len(scores)), results)
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.set_xlabel("share of the held-out passages told right")
    tidy(curve, bars)
    figure.suptitle(f"Comment, docstring, error or reference? {setting(args)}", fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(
        epochs="passes over the training data",
        hidden="hidden size",
        batch="passages per batch",
        length="words and signs of a passage at most",
        passages="passages of each kind to train on at most",
        files="modules of the standard library to read at most",
    )
    top = program("Tells four kinds of English about Python apart.", sizes, FULL, "text_classification.png")
    top.add_argument("--cell", choices=CELLS, default="gru", help="which RNN (default: gru)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    data = Data(args.files, args.length, args.passages, args.seed)
    print(
        f"{len(data.train):,} passages to train on, {len(data.held_out):,} held out in files of their own, "
        f"{data.vocabulary:,} different words. {setting(args)}.",
        flush=True,
    )
    torch.manual_seed(args.seed)
    model = Classifier(args.cell, data.vocabulary, args.hidden)
    losses = train(model, data, args)
    found = probabilities(model, data)
    mixed = probabilities(model, data, shuffled=torch.Generator().manual_seed(args.seed))
    results = {
        "always the most common kind": data.majority(),
        "bag of words, linear": data.bag_of_words(),
        CELLS[args.cell]: found.argmax(-1),
        f"{CELLS[args.cell]}, words shuffled": mixed.argmax(-1),
    }
    good = report(data, found, results, args)
    draw(data, losses, results, args, args.output)
    print(f"Picture:    {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
