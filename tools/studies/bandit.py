"""The planted bandit of tests/bandit.py for many runs at once: R runs are R rows of every tensor.

The formulas are those of algorithms/ppo.py and its components, stated for one-token responses, so
that a policy is a table [P, A] of action probabilities; tests/tools/test_study_bandit.py compares
them with the real page. P prompts (the first half easy), A actions, B samples an iteration, H
hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.studies.networks import (
    A,
    P,
    Stepper,
    critic_weights,
    group_logits,
    head_weights,
    log_policy,
    value_and_features,
)
from tools.studies.systems import Memory, System

B = 256
EASY = P // 2
EASY_ACTIONS, HARD_ACTIONS, HACKS = 15, 2, 3
NOISE = 0.3
LR, HEAD_LR, EPOCHS, CLIP, VALUE_CLIP = 3e-3, 1e-2, 2, 0.2, 0.2
EVERY = 10  # iterations between two rows of a trace


# -------------------------------------------------------------------------------------- the worlds


@dataclass(frozen=True)
class WorldSpec:
    """Place and proxy score of the hacks, and how far apart the proxy's levels of prompts are."""

    hacks: str = "none"  # none | easy | hard | both
    offset: float = 0.0  # standard deviation of a number added to all proxy scores of a prompt
    hack_proxy: float = 2.5  # a right action has 1
    hack_odds: float = 0.3  # of a hack against any other action, under the reference

    @property
    def name(self) -> str:
        return f"hacks {self.hacks}, offset {self.offset:g}"


@dataclass(frozen=True)
class World:
    """gold, proxy: mean reward of each action; reference: action probabilities. All [R, P, A]."""

    gold: Tensor
    proxy: Tensor
    reference: Tensor

    @staticmethod
    def make(spec: WorldSpec, seeds: Sequence[int]) -> World:
        worlds = [_one_world(spec, seed) for seed in seeds]
        return World(*(torch.stack(parts) for parts in zip(*worlds, strict=True)))

    def repeated(self, times: int) -> World:
        return World(*(x.repeat(times, 1, 1) for x in (self.gold, self.proxy, self.reference)))


def _one_world(spec: WorldSpec, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10_000 + seed)
    gold, proxy, odds = torch.zeros(P, A), torch.zeros(P, A), torch.ones(P, A)
    for prompt in range(P):
        order = torch.randperm(A, generator=generator)
        half = "easy" if prompt < EASY else "hard"
        good = order[: EASY_ACTIONS if half == "easy" else HARD_ACTIONS]
        gold[prompt, good] = proxy[prompt, good] = 1.0
        if spec.hacks in (half, "both"):
            bad = order[-HACKS:]
            gold[prompt, bad], proxy[prompt, bad] = -1.0, spec.hack_proxy
            odds[prompt, bad] = spec.hack_odds
    proxy = proxy + spec.offset * torch.randn(P, 1, generator=generator)
    return gold, proxy, odds / odds.sum(1, keepdim=True)


class Draws:
    """All randomness of training: the same for every system and price of a seed."""

    def __init__(self, seeds: Sequence[int], steps: int) -> None:
        generators = [torch.Generator().manual_seed(20_000 + seed) for seed in seeds]
        shape = (steps, B)
        self._prompts = torch.stack([torch.randint(P, shape, generator=g) for g in generators], 1)
        self._uniform = torch.stack([torch.rand(shape, generator=g) for g in generators], 1)
        self._noise = torch.stack([torch.randn(shape, generator=g) for g in generators], 1)

    def prompts(self, step: int) -> Tensor:
        """Return prompt ids [seeds, B]."""
        return self._prompts[step]

    def noise(self, step: int) -> Tensor:
        """Return the reward model's noise [seeds, B], of standard deviation NOISE."""
        return NOISE * self._noise[step]

    def actions(self, logp: Tensor, ids: Tensor, step: int) -> Tensor:
        """Return an action for each prompt id [R, B] by the inverse of the cumulative sum of
        exp(logp) [R, P, A]; the runs are blocks of all seeds."""
        cdf = logp.double().exp().cumsum(-1)
        cdf = cdf / cdf[..., -1:]
        runs = len(ids)
        row = torch.arange(runs)[:, None] * P + ids
        edges = (cdf.view(runs * P, A) + torch.arange(runs * P)[:, None]).view(-1)
        uniform = self._uniform[step].double()
        key = row + uniform.repeat(runs // len(uniform), 1)
        return (torch.searchsorted(edges, key, right=True) - row * A).clamp(0, A - 1)


# ---------------------------------------------------------------------------------------- training


@dataclass
class Moments:
    """Running mean and deviation of all scores of each run (Chan et al. 1979). [R]"""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, raw: Tensor) -> Tensor:
        """Take in [R, B]; return the standard deviation so far [R, 1]."""
        mean = raw.mean(1, keepdim=True)
        delta, total = mean - self.mean, self.count + raw.shape[1]
        within = (raw - mean).square().sum(1, keepdim=True)
        between = delta.square() * self.count * raw.shape[1] / total
        self.squares = self.squares + within + between
        self.mean = self.mean + delta * raw.shape[1] / total
        self.count = total
        return (self.squares / total).sqrt()


class Runs:
    """R runs of one system: all prices, and all seeds for each."""

    def __init__(
        self, system: System, world: World, start: list[Tensor], etas: Sequence[float],
        seeds: Sequence[int], draws: Draws, reward_clip: float = 5.0,
    ) -> None:  # fmt: skip
        """start: weights of the reference policy of each seed."""
        times = len(etas)
        self.system, self.draws, self.reward_clip = system, draws, reward_clip
        self.world = world.repeated(times)
        self.times = times

        def tiled(weights: list[Tensor]) -> list[Tensor]:
            return [w.repeat(times, *[1] * (w.dim() - 1)) for w in weights]

        self.actor = Stepper(tiled(start), LR)
        self.critic = Stepper(tiled(critic_weights(seeds)), LR)
        self.head = Stepper(tiled(head_weights(seeds)), HEAD_LR)
        self.eta = torch.tensor(etas).repeat_interleave(len(seeds))[:, None]
        self.memory = Memory(system, len(self.eta), B)
        self.moments = Moments()
        self.price = torch.zeros(len(self.eta))  # sum over iterations of the mean KL coefficient
        with torch.no_grad():
            self.reference = log_policy(self.actor.weights)

    def step(self, step: int) -> None:
        """Run one iteration of algorithms/ppo.py."""
        ids = self.draws.prompts(step).repeat(self.times, 1)
        with torch.no_grad():
            logp = log_policy(self.actor.weights)
            actions = self.draws.actions(logp, ids, step)
            at = ids * A + actions  # of a flattened table [P, A]
            old, reference, raw = (
                x.flatten(1).gather(1, at) for x in (logp, self.reference, self.world.proxy)
            )
            raw = (raw + self.draws.noise(step).repeat(self.times, 1)).double()
            std = self.moments.add(raw)
            shaped = ((raw - self.moments.mean) / std).clamp(-self.reward_clip, self.reward_clip)
            scores = ((raw - raw.mean(1, keepdim=True)) / std).clamp(-3, 3)
            table, features = value_and_features(self.critic.weights)
            values = table.gather(1, ids)
            head = self.system.groups == "head"
            logits = group_logits(self.head.weights, features) if head else None
            labels = self.memory.labels(logits, table, ids)
            groups = self.memory.measure(labels, scores)
            weights = self.memory.weights(groups)
            price = self.eta * self.memory.relative_price(groups)
            price = price / (weights if self.system.over_price else 1.0)
            rewards = (shaped - price * (old - reference)).float()
            advantages = rewards - values
            spread, mean = torch.var_mean(advantages, 1, correction=0, keepdim=True)
            advantages = (advantages - mean) * torch.rsqrt(spread + 1e-8) * weights.float()
            coefficients = groups.loss_coefficients().float()
            self.price += price.expand_as(raw).mean(1).float()
        for _ in range(EPOCHS):
            self._criticise(ids, values, rewards, coefficients)
        for _ in range(EPOCHS):
            now = log_policy(self.actor.weights).flatten(1).gather(1, at)
            ratio = (now - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            torch.maximum(-ratio * advantages, -clipped * advantages).mean(1).sum().backward()
            self.actor.step()
        self.memory.observe(groups, raw)

    def _criticise(self, ids: Tensor, old: Tensor, returns: Tensor, coefficients: Tensor) -> None:
        table, features = value_and_features(self.critic.weights)
        value = table.gather(1, ids)
        clipped = old + (value - old).clamp(-VALUE_CLIP, VALUE_CLIP)
        worse = torch.maximum((value - returns).square(), (clipped - returns).square())
        (worse / 2).mean(1).sum().backward()
        self.critic.step()
        if self.system.groups == "head":
            p = group_logits(self.head.weights, features.detach()).softmax(-1)
            gain = self.system.entropy * torch.special.entr(p).sum(-1).gather(1, ids)
            gain = gain + (coefficients * p.gather(1, ids[..., None].expand(-1, -1, 2))).sum(-1)
            (-gain.mean(1).sum()).backward()
            self.head.step()

    @torch.no_grad()
    def measured(self) -> dict[str, Tensor]:
        """Return exact expectations under today's policies, [R] each."""
        logp = log_policy(self.actor.weights)
        pi = logp.exp()
        kl = (pi * (logp - self.reference)).sum(-1)
        tables = {"gold": (pi * self.world.gold).sum(-1), "proxy": (pi * self.world.proxy).sum(-1)}
        halves = {}
        for name, table in {**tables, "kl": kl}.items():
            halves[f"{name}_easy"] = table[:, :EASY].mean(1)
            halves[f"{name}_hard"] = table[:, EASY:].mean(1)
        return halves


def train(runs: Runs, steps: int) -> dict[str, list[list[float]]]:
    """Train; return the trace: name -> one row of R numbers every EVERY iterations, the start and
    the end included."""
    trace: dict[str, list[list[float]]] = {}

    def note(step: int) -> None:
        found = {**runs.measured(), "price": runs.price / max(step, 1)}
        found["step"] = torch.full_like(runs.price, step)
        for name, x in found.items():
            trace.setdefault(name, []).append([round(float(v), 6) for v in x])

    note(0)
    for step in range(steps):
        runs.step(step)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            note(step + 1)
    return trace
