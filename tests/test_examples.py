"""examples/: that they run and print what they promise, and what could be wrong in the PPO without anyone noticing."""

import argparse
import math
import re
from functools import partial

import gymnasium
import pytest
import torch
from programs import is_whole_png, load, run, table
from torch import nn

import fastrnn

ppo, ragged = load("recurrent_ppo"), load("ragged")


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads do not pay for layers this small, and where other processes work at the same time they cost."""
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------- as programs


def test_recurrent_ppo(tmp_path):
    done = run("recurrent_ppo", "--quick", "--seed", "3", "--output", "p.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    loop, call = table(done.stdout, "loop over steps, torch.nn"), table(done.stdout, "one call with reset=, fastrnn")
    assert loop[1:5] == call[1:5]  # return, goal, updates, environment steps
    assert call[2:5] == ["not yet", "12", f"{12 * 4 * 32:,}"]
    assert all(float(cell) > 0 for cell in (loop[5], call[5]))  # milliseconds per update
    gap = re.search(r"^Parameters: at most (\S+) apart after each of the first 10 updates$", done.stdout, re.M)
    assert float(gap[1]) <= 1e-4
    assert "the same actions in the first 12 of 12" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]
    assert is_whole_png(tmp_path / "p.png")


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--module", "fastrnn"], ["loop over steps, fastrnn.LSTM", "one call with reset=, fastrnn.LSTM"]),
        (["--update", "loop"], ["loop over steps, torch.nn.LSTM"]),
        (["--update", "sequence"], ["one call with reset=, fastrnn.LSTM"]),
        (["--envs", "1", "--steps", "1"], ["loop over steps, torch.nn.LSTM", "one call with reset=, fastrnn.LSTM"]),
    ],
    ids=["fastrnn's loop", "loop alone", "one call alone", "one step of one environment"],
)
def test_the_ways_of_recurrent_ppo(arguments, names, capsys, tmp_path):
    assert ppo.main(["--quick", "--updates", "2", "--output", str(tmp_path / "p.png"), *arguments]) == 0
    output = capsys.readouterr().out
    ways = [line for line in output.splitlines() if re.match(r"(loop|one call).* not yet ", line)]
    assert [re.split(r"\s{2,}", line)[0] for line in ways] == names
    assert ("Parameters:" in output) == (len(names) == 2)
    assert is_whole_png(tmp_path / "p.png")


def test_ragged(tmp_path):
    done = run("ragged", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    theirs, ours = table(done.stdout, "torch.nn.GRU, packed"), table(done.stdout, "fastrnn.GRU, lengths=")
    assert theirs[1] == ours[1]  # loss of the first step
    gap = re.search(r"^Losses: +at most (\S+) apart in the first 10 steps, at most 0.0001", done.stdout, re.M)
    assert float(gap[1]) <= 1e-4
    baseline = float(re.search(r"^Baseline: +(\S+)%", done.stdout, re.M)[1])
    assert float(ours[3].rstrip("%")) > baseline + 5
    assert [p.name for p in tmp_path.iterdir()] == ["ragged.png"]
    assert is_whole_png(tmp_path / "ragged.png")


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("recurrent_ppo", ["--update", "sometimes"]),
        ("recurrent_ppo", ["--module", "jax"]),
        ("recurrent_ppo", ["--envs", "0"]),
        ("recurrent_ppo", ["--steps", "x"]),
        ("recurrent_ppo", ["--updates", "-1"]),
        ("recurrent_ppo", ["--threads", "0"]),
        ("recurrent_ppo", ["--seed", "-1"]),
        ("recurrent_ppo", ["--output", "nowhere/p.png"]),
        ("ragged", ["--cell", "rnn"]),
        ("ragged", ["--length", "0"]),
        ("ragged", ["--seed", "1.5"]),
        ("ragged", ["--output", "."]),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(name, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        {"recurrent_ppo": ppo, "ragged": ragged}[name].main(arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- advantages


def by_definition(rewards, values, last_values, final_values, terminated, truncated, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, up to the end of the episode or of the unroll."""
    T, B = rewards.shape
    found = torch.zeros(T, B, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for l in range(T - t):
                s = t + l
                if terminated[s, b]:
                    after = 0.0
                elif truncated[s, b]:
                    after = final_values[s, b].item()
                else:
                    after = values[s + 1, b].item() if s + 1 < T else last_values[b].item()
                delta = rewards[s, b].item() + gamma * after - values[s, b].item()
                found[t, b] += (gamma * lam) ** l * delta
                if terminated[s, b] or truncated[s, b]:
                    break
    return found


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 1.0), (1.0, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    T, B = 37, 6
    rewards, values = torch.randn(2, T, B, dtype=torch.float64)
    last_values, final_values = torch.randn(B, dtype=torch.float64), torch.randn(T, B, dtype=torch.float64)
    terminated, truncated = torch.rand(2, T, B) < 0.1
    terminated[-1, 0], truncated[-1, 1] = True, True
    terminated[5, 2] = truncated[5, 2] = True  # both at once: the episode is over
    truncated[0, 3] = terminated[0, 4] = True
    arguments = (rewards, values, last_values, final_values, terminated, truncated, gamma, lam)
    want = by_definition(*arguments)
    assert (ppo.gae(*arguments) - want).abs().max() <= 1e-12 * want.abs().max()


def test_gae_does_not_see_final_values_where_nothing_was_cut():
    T, B = 9, 3
    rewards, values = torch.randn(2, T, B)
    last_values = torch.randn(B)
    never, terminated = torch.zeros(T, B, dtype=torch.bool), torch.rand(T, B) < 0.3
    nothing, poison = torch.zeros(T, B), torch.full((T, B), math.nan)
    clean, poisoned = (ppo.gae(rewards, values, last_values, x, terminated, never) for x in (nothing, poison))
    assert torch.equal(clean, poisoned)


# ---------------------------------------------------------------------------------------------------- rollouts


def settings(**kwargs):
    return argparse.Namespace(**(dict(seed=11, envs=3, steps=25, updates=10) | kwargs))


def test_rollouts_tell_what_happened(monkeypatch):
    """Every environment replayed by itself, with the actions taken, and every episode evaluated by itself in float64.

    Episodes are cut at 19 steps, so that some are truncated and some end, and most of them span two unrolls.
    """
    make = partial(gymnasium.make, max_episode_steps=19)
    monkeypatch.setattr(ppo.gymnasium, "make", make)
    args = settings()
    learner = ppo.Learner("sequence", fastrnn.LSTM, args)
    unrolls = [learner.rollout() for _ in range(3)]
    T, steps = args.steps, 3 * args.steps
    actions, starts, observations, values, advantages = (
        torch.cat([getattr(u, name) for u in unrolls])
        for name in ("actions", "starts", "observations", "values", "advantages")
    )
    exact = ppo.Policy(nn.LSTM).double()
    exact.load_state_dict(learner.policy.state_dict())
    ended, cut = torch.zeros(2, steps, args.envs, dtype=torch.bool)
    want_values, following = torch.zeros(2, steps, args.envs, dtype=torch.float64)
    returns = []
    for b in range(args.envs):
        env = make("CartPole-v1")
        begin, episode = 0, [ppo.seen(env.reset(seed=args.seed + b)[0])]
        for t in range(steps):
            assert starts[t, b] == (len(episode) == 1)
            assert torch.equal(observations[t, b], episode[-1])
            observation, _, ended[t, b], cut[t, b], _ = env.step(actions[t, b].item())
            episode.append(ppo.seen(observation))
            if ended[t, b] or cut[t, b] or t == steps - 1:
                with torch.no_grad():
                    found = exact.heads(exact.lstm(torch.stack(episode).double())[0])[1]
                want_values[begin : t + 1, b], following[begin : t + 1, b] = found[:-1], found[1:]
                if ended[t, b] or cut[t, b]:
                    returns.append(t + 1 - begin)
                begin, episode = t + 1, [ppo.seen(env.reset()[0])]
    assert ended.any() and (cut & ~ended).any()
    assert sorted(learner.returns) == sorted(returns)
    assert (values - want_values).abs().max() <= 1e-5
    for i, got in enumerate(advantages.split(T)):
        part = slice(i * T, (i + 1) * T)
        want = by_definition(
            torch.full((T, args.envs), ppo.REWARD_SCALE, dtype=torch.float64), want_values[part],
            following[part][-1], following[part], ended[part], cut[part], ppo.GAMMA, ppo.LAMBDA,
        )  # fmt: skip
        assert (got - want).abs().max() <= 1e-5


def test_actions_are_drawn_with_the_policys_probabilities():
    learner = ppo.Learner("sequence", fastrnn.LSTM, settings(envs=8, steps=500))
    with torch.no_grad():
        learner.policy.actor.bias.copy_(torch.tensor([0.0, math.log(3)]))
    unroll = learner.rollout()
    share = (unroll.actions == 1).double().mean().item()
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / unroll.actions.numel()) + 0.01  # + 0.01: the actor's weights
    assert (unroll.log_probs.exp() - torch.where(unroll.actions == 1, 0.75, 0.25)).abs().max() < 0.05


# ---------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("lstm_class", [nn.LSTM, fastrnn.LSTM])
def test_one_call_with_resets_equals_the_loop(rule, lstm_class):
    """Logits, values and every gradient, of the state before the unroll and of the observations too."""

    def draw(n):
        torch.manual_seed(n)
        T, B = 23, 5
        observations, state = torch.randn(T, B, 2), torch.randn(2, 1, B, ppo.HIDDEN)
        starts = torch.rand(T, B) < 0.2
        starts[0] = torch.arange(B) < 2  # of some environments the state before the unroll counts, of some it does not
        policy = ppo.Policy(fastrnn.LSTM)
        weights = torch.randn(3, T, B)
        results = []
        for way, kind, dtype in (
            ("sequence", fastrnn.LSTM, torch.float32),
            ("loop", lstm_class, torch.float32),
            ("loop", nn.LSTM, torch.float64),
        ):
            other = ppo.Policy(kind).to(dtype)
            other.load_state_dict(policy.state_dict())
            x, h, c = (t.to(dtype).requires_grad_() for t in (observations, *state))
            logits, values = getattr(other, way)(x, (h, c), starts)
            loss = (logits * weights[:2].permute(1, 2, 0)).sum() + (values * weights[2]).sum()
            names, wanted = zip(*other.named_parameters())
            gradients = torch.autograd.grad(loss, (x, h, c, *wanted))
            found = dict(zip(("observations", "h", "c", *names), gradients))
            assert (found["h"][0, :2] == 0).all() and (found["h"][0, 2:] != 0).any()
            results.append(found | {"logits": logits, "values": values})
        return results

    rule.check(draw, torch.float32)


def test_ten_updates_both_ways_give_the_same_parameters():
    args = settings(envs=4, steps=32)
    learners = [ppo.Learner("loop", nn.LSTM, args), ppo.Learner("sequence", fastrnn.LSTM, args)]
    before = learners[0].parameters()
    assert torch.equal(before, learners[1].parameters())
    comparison = ppo.train(learners, args)
    assert len(comparison.gaps) == comparison.same == 10
    assert max(comparison.gaps) <= 1e-4
    assert (learners[0].parameters() - before).abs().max() > 1e-2  # they have learned something
    assert (learners[0].parameters() - learners[1].parameters()).abs().max().item() == comparison.gaps[-1]


def test_what_the_comparison_would_notice(monkeypatch):
    """An update that ignores where episodes start is told apart from one that does not."""
    args = settings(envs=4, steps=32, updates=2)
    learners = [ppo.Learner("loop", nn.LSTM, args), ppo.Learner("sequence", fastrnn.LSTM, args)]
    policy = learners[1].policy
    learners[1].evaluate = lambda x, state, starts: policy.sequence(x, state, torch.zeros_like(starts))
    assert max(ppo.train(learners, args).gaps) > 1e-4


def test_it_learns():
    """Eight seeds took 52 to 77 updates to the goal."""
    args = argparse.Namespace(seed=0, **ppo.FULL | dict(updates=120))
    learner = ppo.Learner("sequence", fastrnn.LSTM, args)
    ppo.train([learner], args)
    assert learner.reached is not None
    assert learner.mean_return() >= ppo.GOAL == 400


# ---------------------------------------------------------------------------------------------------- ragged


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_the_classifier_is_the_same_packed_and_with_lengths(cell, rule):
    def draw(n):
        torch.manual_seed(n)
        tokens, lengths = torch.randint(50, (17, 6)), torch.tensor([3, 17, 1, 9, 9, 2])
        theirs = ragged.Classifier(getattr(nn, cell), 50, 24)
        results = []
        for package, dtype in ((fastrnn, torch.float32), (nn, torch.float32), (nn, torch.float64)):
            model = ragged.Classifier(getattr(package, cell), 50, 24).to(dtype)
            model.load_state_dict(theirs.state_dict())
            logits = model(tokens, lengths)
            logits.square().sum().backward()
            results.append({"logits": logits} | {name: p.grad for name, p in model.named_parameters()})
        return results

    rule.check(draw, torch.float32)


def test_functions_are_found_once_each(tmp_path):
    (tmp_path / "a.py").write_text(
        "x = 1\ndef f():\n    def inside():\n        pass\n    return 2\n\n"
        "class C:\n    async def g(self):\n        return 3\nif x:\n    def h(): pass\n"
    )
    assert sorted(ragged.functions(tmp_path)) == [
        "    async def g(self):\n        return 3",
        "    def h(): pass",
        "def f():\n    def inside():\n        pass\n    return 2",
    ]


def test_every_function_is_trained_on_once_an_epoch_and_none_that_is_held_out():
    data = ragged.Data(16, seed=0)
    assert not set(data.train) & set(data.held_out)
    assert len(data.train) + len(data.held_out) == len(data.tokens) == len(data.labels)
    epochs = [i for rows in data.batches(2, 64, seed=0) for i in rows]
    first, second = epochs[: len(data.train)], epochs[len(data.train) :]
    assert sorted(first) == sorted(second) == sorted(data.train)
    assert first != second
    tokens, lengths, labels = data.batch(first[:7])
    assert tokens.shape == (lengths.max(), 7) and lengths.min() >= 1
    assert torch.equal(labels, data.labels[first[:7]])
    assert all(torch.equal(tokens[:n, i], data.tokens[row]) for i, (row, n) in enumerate(zip(first[:7], lengths)))
