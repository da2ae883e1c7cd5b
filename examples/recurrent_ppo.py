"""Recurrent PPO on CartPole with its velocities hidden: the update as one call with resets, beside a loop over steps.

    python examples/recurrent_ppo.py                      trains twice from one seed, compares, draws a picture
    python examples/recurrent_ppo.py --update sequence    trains once, the way fastrnn offers

An LSTM policy sees the cart's position and the pole's angle alone: it has to remember where they were to know how fast
they move. Episodes end and begin in the middle of an unroll of T steps in B environments, and the state has to start
from zero there. Two ways to evaluate such an unroll, in every minibatch of every epoch of an update:

    sequence    hidden, _ = lstm(observations, state0, reset=starts)    one call, fastrnn.LSTM
    loop        for t in range(T): one call, on the state times (1 - starts[t])    what PPO codes do today

Both see the same environments, initial weights, minibatches and random numbers, so both must learn the same.
PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2016, arXiv:1506.02438. The loop is that of
CleanRL's ppo_atari_lstm.py.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

import fastrnn
from fastrnn.drawing import OURS, THEIRS, save, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

FULL = dict(envs=16, steps=128, updates=400)
QUICK = dict(envs=4, steps=32, updates=12)
HIDDEN = 64
LEARNING_RATE, ADAM_EPS, CLIP_NORM = 2.5e-3, 1e-5, 0.5
EPOCHS, MINIBATCHES = 4, 2  # with 4 minibatches a change of one rounding is ten times as large after ten updates
GAMMA, LAMBDA = 0.99, 0.95
CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.5, 0.0
REWARD_SCALE = 0.02  # values near 1: their loss would otherwise drown the policy's in the layers they share
GOAL, EPISODES = 400.0, 100  # trained: mean return of the last hundred episodes, of the policy that explores
SAME, SAME_LIMIT = 10, 1e-4  # after each of the first ten updates the parameters of both ways agree to this
NAMES = {  # (way, whether on fastrnn)
    ("sequence", True): "one call with reset=, fastrnn.LSTM",
    ("loop", True): "loop over steps, fastrnn.LSTM",
    ("loop", False): "loop over steps, torch.nn.LSTM",
}
SEEN, SCALE = [0, 2], [2.4, 0.2095]  # of CartPole's four observations, and where an episode ends


class Unroll(NamedTuple):
    """T steps of B environments. starts: True where an episode begins at that step. state0: before the first step."""

    observations: torch.Tensor  # (T, B, 2)
    starts: torch.Tensor  # (T, B) bool
    actions: torch.Tensor  # (T, B)
    log_probs: torch.Tensor  # (T, B), of those actions when they were taken
    values: torch.Tensor  # (T, B)
    advantages: torch.Tensor  # (T, B)
    state0: tuple[torch.Tensor, torch.Tensor]  # (1, B, H) each


# ---------------------------------------------------------------------------------------------------- policy


class Policy(nn.Module):
    """LSTM -> logits of the actions, and the value. The two ways of an update are `sequence` and `loop`."""

    def __init__(self, lstm_class: type[nn.LSTM], observations: int = len(SEEN), actions: int = 2):
        super().__init__()
        self.lstm = lstm_class(observations, HIDDEN)
        self.actor = nn.Linear(HIDDEN, actions)
        self.critic = nn.Linear(HIDDEN, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)  # all actions as likely as each other, to begin with
        nn.init.zeros_(self.actor.bias)

    def heads(self, hidden):
        return self.actor(hidden), self.critic(hidden).squeeze(-1)

    def step(self, observation, state, start):
        """One step of B environments, from zero where an episode starts: hidden (1, B, H), state."""
        keep = (~start).to(observation.dtype)[:, None]
        return self.lstm(observation[None], tuple(keep * s for s in state))

    def sequence(self, observations, state, starts):
        """(logits, values) of a whole unroll, (T, B, ·)."""
        hidden, _ = self.lstm(observations, state, reset=starts)
        return self.heads(hidden)

    def loop(self, observations, state, starts):
        """The same, step by step."""
        hidden = []
        for observation, start in zip(observations, starts):
            h, state = self.step(observation, state, start)
            hidden.append(h)
        return self.heads(torch.cat(hidden))


def gae(rewards, values, last_values, final_values, terminated, truncated, gamma=GAMMA, lam=LAMBDA):
    """Generalised advantage estimates, (T, B).

    What follows step t is worth nothing after a termination, `final_values[t]` after a truncation (the value of the
    observation the episode was cut at), and otherwise the value of step t + 1, `last_values` (B,) after the last one.
    """
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(last_values)
    following = last_values
    for t in reversed(range(len(rewards))):
        after = torch.where(terminated[t], 0.0, torch.where(truncated[t], final_values[t], following))
        delta = rewards[t] + gamma * after - values[t]
        carry = delta + gamma * lam * torch.where(terminated[t] | truncated[t], 0.0, carry)
        advantages[t], following = carry, values[t]
    return advantages


# ---------------------------------------------------------------------------------------------------- training


def seen(observation) -> torch.Tensor:
    """What the policy gets to see: position and angle, scaled to at most about 1."""
    return torch.from_numpy((observation[..., SEEN] / np.array(SCALE)).astype(np.float32))


class Learner:
    """A policy that learns in its own environments, its returns, and the seconds that went into acting and learning."""

    def __init__(self, way: str, lstm_class: type[nn.LSTM], args: argparse.Namespace):
        self.way, self.name = way, NAMES[way, issubclass(lstm_class, fastrnn.LSTM)]
        torch.manual_seed(args.seed)
        self.policy = Policy(lstm_class)
        self.evaluate = getattr(self.policy, way)
        self.optimiser = torch.optim.Adam(self.policy.parameters(), lr=LEARNING_RATE, eps=ADAM_EPS)
        self.random = torch.Generator().manual_seed(args.seed)
        self.T, self.B = args.steps, args.envs
        # SAME_STEP: the observation that ends an episode comes in `info`, the one returned begins the next episode. So
        # every step is a real one; the default, NEXT_STEP, puts a step between episodes in which the action is ignored.
        self.envs = SyncVectorEnv(
            [lambda: gymnasium.make("CartPole-v1", disable_env_checker=True)] * args.envs,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        self.observation = seen(self.envs.reset(seed=args.seed)[0])
        self.start = torch.ones(args.envs, dtype=torch.bool)
        self.state = (torch.zeros(1, args.envs, HIDDEN), torch.zeros(1, args.envs, HIDDEN))
        self.running = np.zeros(args.envs)  # returns of the episodes under way
        self.returns: deque[float] = deque(maxlen=EPISODES)
        self.curve: list[float] = []  # mean return after each update
        self.acting: list[float] = []  # seconds, update by update
        self.learning: list[float] = []
        self.reached: int | None = None  # after how many updates the goal was

    @property
    def done(self) -> int:
        return len(self.learning)

    def mean_return(self) -> float:
        return sum(self.returns) / max(1, len(self.returns))

    @torch.no_grad()
    def rollout(self) -> Unroll:
        """T steps of every environment by the policy as it is."""
        policy, T, B = self.policy, self.T, self.B
        observations, starts = torch.empty(T, B, len(SEEN)), torch.empty(T, B, dtype=torch.bool)
        actions, log_probs = torch.empty(T, B, dtype=torch.long), torch.empty(T, B)
        values, rewards, final_values = torch.empty(T, B), torch.empty(T, B), torch.zeros(T, B)
        terminated, truncated = torch.empty(T, B, dtype=torch.bool), torch.empty(T, B, dtype=torch.bool)
        # An action is where a uniform number falls in the cumulated probabilities: two policies a rounding apart take
        # the same actions, unless a number falls into that gap.
        uniform = torch.rand(T, B, generator=self.random)
        state0 = self.state
        for t in range(T):
            observations[t], starts[t] = self.observation, self.start
            hidden, self.state = policy.step(self.observation, self.state, self.start)
            logits, value = policy.heads(hidden[0])
            log_p = logits.log_softmax(-1)
            action = (uniform[t][:, None] >= log_p.exp().cumsum(-1)[:, :-1]).sum(-1)
            actions[t], values[t] = action, value
            log_probs[t] = log_p.gather(-1, action[:, None]).squeeze(-1)

            observation, reward, ended, cut, info = self.envs.step(action.numpy())
            self.observation = seen(observation)
            rewards[t], terminated[t], truncated[t] = map(torch.from_numpy, (reward, ended, cut))
            self.start = terminated[t] | truncated[t]
            if cut.any():
                # The episode would go on: what its last observation is worth, on the state it was left in.
                final = self.observation.clone()
                for i in np.flatnonzero(cut):
                    final[i] = seen(info["final_obs"][i])
                hidden, _ = policy.step(final, self.state, torch.zeros_like(self.start))
                final_values[t] = policy.heads(hidden[0])[1]
            self.running += reward
            for i in np.flatnonzero(ended | cut):
                self.returns.append(self.running[i])
                self.running[i] = 0
        hidden, _ = policy.step(self.observation, self.state, self.start)
        last_values = policy.heads(hidden[0])[1]
        advantages = gae(REWARD_SCALE * rewards, values, last_values, final_values, terminated, truncated)
        return Unroll(observations, starts, actions, log_probs, values, advantages, state0)

    def loss(self, unroll: Unroll, rows: torch.Tensor) -> torch.Tensor:
        """PPO's loss over the whole unrolls of some of the environments: sequences stay sequences."""
        state0 = tuple(s[:, rows] for s in unroll.state0)
        observations, starts, actions, log_probs, values, advantages = (x[:, rows] for x in unroll[:-1])
        logits, value = self.evaluate(observations, state0, starts)
        log_p = logits.log_softmax(-1)
        ratio = (log_p.gather(-1, actions[..., None]).squeeze(-1) - log_probs).exp()
        target = values + advantages
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        return VALUE_WEIGHT * (value - target).square().mean() - gain - ENTROPY_WEIGHT * entropy

    def update(self, unroll: Unroll) -> None:
        for _ in range(EPOCHS):
            for rows in torch.randperm(self.B, generator=self.random).chunk(MINIBATCHES):
                loss = self.loss(unroll, rows)
                self.optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP_NORM)
                self.optimiser.step()

    def advance(self) -> Unroll:
        """One rollout and one update."""
        begin = time.perf_counter()
        unroll = self.rollout()
        middle = time.perf_counter()
        self.update(unroll)
        self.learning.append(time.perf_counter() - middle)
        self.acting.append(middle - begin)
        self.curve.append(self.mean_return())
        if self.reached is None and len(self.returns) == EPISODES and self.curve[-1] >= GOAL:
            self.reached = self.done
        return unroll

    def parameters(self) -> torch.Tensor:
        """All of them as one vector."""
        return nn.utils.parameters_to_vector(self.policy.parameters()).detach()


def same_rollout(one: Unroll, other: Unroll) -> bool:
    return all(torch.equal(getattr(one, x), getattr(other, x)) for x in ("observations", "starts", "actions"))


class Comparison(NamedTuple):
    gaps: list[float]  # largest difference of a parameter after each of the first updates that saw the same rollouts
    same: int  # rollouts from the first on that were the same, action by action


def train(learners: list[Learner], args: argparse.Namespace) -> Comparison:
    """Every learner to the goal. They take turns, so that a machine which slows down meanwhile does so for both."""
    gaps: list[float] = []
    same = 0
    with Progress({learner.name: args.updates for learner in learners}) as progress:
        for update in range(args.updates):
            running = [learner for learner in learners if learner.reached is None]
            if not running:
                break
            unrolls = []
            for learner in running if update % 2 else running[::-1]:
                unrolls.append(learner.advance())
                text = f"return {learner.mean_return():5.1f}  update {1e3 * learner.learning[-1]:6.1f} ms"
                progress.update(learner.name, learner.done, text)
            if len(unrolls) == 2:
                same += same == update and same_rollout(*unrolls)
                if update < min(same, SAME):
                    one, other = (learner.parameters() for learner in learners)
                    gaps.append((one - other).abs().max().item())
    return Comparison(gaps, same)


# ---------------------------------------------------------------------------------------------------- report


def setting(args: argparse.Namespace) -> str:
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    environments = "1 environment" if args.envs == 1 else f"{args.envs} environments"
    isa = fastrnn.build_info()["isa"]
    return f"LSTM of {HIDDEN}, {environments} x {args.steps} steps, seed {args.seed}, {threads}, {isa}"


def seconds(learner: Learner, kind: str, updates: int | None = None) -> float:
    """Wall clock of some of its updates: `acting`, `learning`, or `both`."""
    if kind == "both":
        return seconds(learner, "acting", updates) + seconds(learner, "learning", updates)
    return sum(getattr(learner, kind)[:updates])


def report(learners: list[Learner], comparison: Comparison, args: argparse.Namespace) -> bool:
    """Prints the figures; False if a number is not finite or the two ways differ where rounding cannot explain it."""
    rows = []
    for learner in learners:
        kinds = [seconds(learner, kind) for kind in ("acting", "learning", "both")]
        rows.append([
            learner.name, f"{learner.mean_return():.1f}", "reached" if learner.reached else "not yet",
            str(learner.done), f"{learner.done * args.envs * args.steps:,}",
            f"{1e3 * kinds[1] / learner.done:.1f}", *(f"{kind:.1f}" for kind in kinds),
        ])  # fmt: skip
    header = ["update by", "return", "goal", "updates", "env steps", "ms/update", "acting, s", "updates, s", "all, s"]
    print_table(setting(args), header, rows)
    print(f"Goal:       a mean return of {GOAL:.0f} over the last {EPISODES} episodes (at most 500 each)")
    good = all(bool(learner.parameters().isfinite().all()) for learner in learners)
    if len(learners) == 2:
        loop, sequence = learners
        n = min(loop.done, sequence.done)  # of the updates that both have done
        update, everything = (seconds(loop, kind, n) / seconds(sequence, kind, n) for kind in ("learning", "both"))
        print(f"Update:     one call takes 1/{update:.1f} of the loop's time; with acting, 1/{everything:.1f}")
        if loop.reached and sequence.reached:
            print(f"To goal:    {seconds(sequence, 'both'):.1f} s, the loop {seconds(loop, 'both'):.1f} s")
        gap, count = max(comparison.gaps, default=float("inf")), len(comparison.gaps)
        print(f"Parameters: at most {gap:.1e} apart after each of the first {count} updates")
        parted = ", then rounding has its say" if comparison.same < n else ""
        print(f"Rollouts:   the same actions in the first {comparison.same} of {n}{parted}")
        good = good and gap <= SAME_LIMIT
    if not good:
        print(f"FAULT: a parameter is not finite, or two differ by over {SAME_LIMIT:g} in the first {SAME} updates.")
    return good


def draw(learners: list[Learner], comparison: Comparison, args: argparse.Namespace, path: Path) -> None:
    """Mean return over environment steps, and what the wall clock went into."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    curve, bars = figure.subplots(1, 2, width_ratios=[1.5, 1])
    colours = {"loop": THEIRS, "sequence": OURS}
    for i, learner in enumerate(learners):
        colour = colours[learner.way]
        # The two are one curve until rounding tells: the first is drawn wide, so that it shows beneath the second.
        style = dict(linewidth=5, alpha=0.45) if len(learners) > 1 and i == 0 else dict(linewidth=2.2)
        steps = [(update + 1) * args.envs * args.steps for update in range(learner.done)]
        curve.plot(steps, learner.curve, color=colour, solid_capstyle="round", label=learner.name, **style)
        if learner.reached:
            curve.plot(steps[-1], learner.curve[-1], "o", color=colour, markersize=7)
        acting, learning, both = (seconds(learner, kind) for kind in ("acting", "learning", "both"))
        bars.bar(i, acting, 0.55, color=colour, alpha=0.4)
        bars.bar(i, learning, 0.55, bottom=acting, color=colour)
        bars.annotate(
            f"{both:.1f} s\n{acting:.1f} acting + {learning:.1f} updates", (i, both), (0, 4),
            textcoords="offset points", ha="center", fontsize=10,
        )  # fmt: skip
    curve.axhline(GOAL, color="#868e96", linewidth=1, linestyle=":")
    if 0 < comparison.same < min(learner.done for learner in learners):
        step = comparison.same * args.envs * args.steps
        curve.axvline(step, color="#868e96", linewidth=1, linestyle=":")
        curve.text(step, 0.97, " the same actions up to here", transform=curve.get_xaxis_transform(), va="top")
    curve.set_ylim(0, 500)
    curve.set_xlim(left=0)
    curve.xaxis.set_major_formatter("{x:,.0f}")
    curve.set_xlabel("environment steps")
    curve.set_ylabel(f"mean return of the last {EPISODES} episodes")
    title(curve, "Learning curves")
    curve.legend(frameon=False, loc="lower right", fontsize=10)
    labels = [
        f"{learner.name.replace(', ', chr(10))}\n{1e3 * seconds(learner, 'learning') / learner.done:.0f} ms per update"
        for learner in learners
    ]
    bars.set_xticks(range(len(learners)), labels)
    bars.set_xlim(-0.6, len(learners) - 0.4)
    bars.margins(y=0.16)
    bars.set_ylabel("seconds (pale: acting)")
    where = "until the goal" if all(learner.reached for learner in learners) else f"of at most {args.updates} updates"
    title(bars, f"Wall clock {where}")
    tidy(curve)
    tidy(bars, grid="y")
    figure.suptitle(f"Recurrent PPO, CartPole-v1 without its velocities\n{setting(args)}", fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(envs="environments (B)", steps="steps of each environment in an unroll (T)", updates="updates at most")
    top = program("Recurrent PPO: the update as one call with resets, beside a loop.", sizes, FULL, "recurrent_ppo.png")
    top.add_argument(
        "--update", choices=["sequence", "loop", "both"], default="both", help="which way to train (default: both)"
    )
    top.add_argument(
        "--module", choices=["torch", "fastrnn"], default="torch", help="whose LSTM the loop uses (default: torch)"
    )
    top.set_defaults(threads=1)  # best for layers this small
    return top


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    loop = ("loop", {"torch": nn.LSTM, "fastrnn": fastrnn.LSTM}[args.module])
    sequence = ("sequence", fastrnn.LSTM)
    ways = {"loop": [loop], "sequence": [sequence], "both": [loop, sequence]}[args.update]

    print(f"CartPole-v1, position and angle only. {setting(args)}.", flush=True)
    for way in ways:  # first-call costs are not training
        Learner(*way, argparse.Namespace(seed=args.seed, envs=args.envs, steps=2)).advance()
    learners = [Learner(*way, args) for way in ways]
    comparison = train(learners, args)
    good = report(learners, comparison, args)
    draw(learners, comparison, args, args.output)
    print(f"Picture:    {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
