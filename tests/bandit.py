"""The planted contextual bandit of algorithm.md section 9, run through the real PPO page and the
real components.

A prompt is one token, a response one of 50 tokens. Half the prompts are easy (15 rewarded actions),
half hard (2). The worlds are those of tools/studies/bandit.py, one seed of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components import protocols
from gipo_megatron.components.advantage import GeneralisedAdvantage
from gipo_megatron.components.groups import (
    CriticHead,
    LabelledGroups,
    NoGroups,
    RandomGroups,
    ValueSplit,
)
from gipo_megatron.components.kl import FixedKL, GroupAdaptiveKL
from gipo_megatron.components.reward import ModelReward
from gipo_megatron.components.rollout import SamplingRollout
from gipo_megatron.components.variance import GroupVariance, NoVariance
from gipo_megatron.local.roles import TorchActor, TorchCritic
from gipo_megatron.roles import DataParallel, SingleReplica
from gipo_megatron.types import Prompts, Rollout, Rows, Sequences, StepResult
from tools.studies.bandit import NOISE, World, WorldSpec

NUM_PROMPTS, NUM_ACTIONS, BATCH = 64, 50, 256
VOCAB = NUM_ACTIONS + NUM_PROMPTS  # actions are tokens 0 … 49, prompts the tokens after them
HIDDEN, LR = 64, 3e-3
PLAIN = WorldSpec("none")


def is_easy(prompt: int) -> bool:
    return prompt < NUM_PROMPTS // 2


class NoisyProxy:
    """A reward model: the proxy's mean plus noise that is a pure function of the seed and the row:
    of sample_id in a rollout, of the prompt in chosen responses."""

    def __init__(self, world: World, seed: int) -> None:
        self.proxy, self.seed = world.proxy[0], seed

    def score(self, batch: Rows) -> Tensor:
        tokens = batch.sequences.tokens
        prompt = tokens[:, 0] - NUM_ACTIONS
        if isinstance(batch, Rollout):
            first = int(batch.sample_id[0])
            noise = self._noise(77_000_000 + self.seed * 1_000_003 + first, len(batch))
        else:
            noise = self._noise(88_000_000 + self.seed, NUM_PROMPTS)[prompt]
        return self.proxy[prompt, tokens[:, 1]] + noise

    @staticmethod
    def _noise(key: int, count: int) -> Tensor:
        return NOISE * torch.randn(count, generator=torch.Generator().manual_seed(key))


def chosen(gold: Tensor, prompt_id: Tensor) -> Sequences:
    """Return each prompt with a right action, as preference data have it."""
    two = torch.full_like(prompt_id, 2)
    tokens = torch.stack([prompt_id + NUM_ACTIONS, gold[prompt_id].argmax(1)], 1)
    return Sequences(tokens, torch.tensor([False, True]).expand(len(two), 2), two - 1, two, two)


def prompts_of(step: int, seed: int) -> Prompts:
    ids = torch.randint(
        NUM_PROMPTS, (BATCH,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step)
    )
    return Prompts(
        tokens=ids[:, None] + NUM_ACTIONS,
        lengths=torch.ones(BATCH, dtype=torch.int64),
        prompt_id=ids,
        sample_id=step * BATCH + torch.arange(BATCH),
        source=tuple("easy" if is_easy(i) else "hard" for i in ids.tolist()),
        extras=tuple({"prompt": str(i)} for i in ids.tolist()),
    )


def all_prompts() -> Sequences:
    ids = torch.arange(NUM_PROMPTS)
    ones = torch.ones_like(ids)
    return Sequences(
        ids[:, None] + NUM_ACTIONS, torch.zeros(NUM_PROMPTS, 1, dtype=torch.bool), ones, ones, ids
    )


# ------------------------------------------------------------------------------------------ systems


@dataclass(frozen=True)
class Outcome:
    """True (gold) mean reward of the easy and of the hard half, and KL to the reference."""

    easy: float
    hard: float
    kl: float

    @property
    def gap(self) -> float:
        return self.easy - self.hard

    @property
    def mean(self) -> float:
        return (self.easy + self.hard) / 2


@dataclass
class Bandit:
    """One system on one world; `ppo.step(k)` is the real algorithm."""

    world: World
    actor: TorchActor
    reference: TorchActor
    ppo: PPO

    @torch.no_grad()
    def policy(self) -> Tensor:
        """[prompts, actions]"""
        return action_logits(self.actor).softmax(-1)

    def outcome(self) -> Outcome:
        """Return exact expectations under today's policy."""
        policy = self.policy()
        halves = (policy * self.world.gold[0]).sum(1).view(2, -1).mean(1).tolist()
        with torch.no_grad():
            reference = action_logits(self.reference).log_softmax(-1)
        kl = (policy * (policy.log() - reference)).sum(1).mean()
        return Outcome(*halves, float(kl))


def action_logits(actor: TorchActor) -> Tensor:
    """[prompts, actions]"""
    prompt = torch.arange(NUM_PROMPTS) + NUM_ACTIONS
    return actor.logits(torch.stack([prompt, torch.zeros_like(prompt)], 1))[:, 1]


Parts = tuple[protocols.GroupClassifier, protocols.VarianceRegulariser, protocols.KLController]
Classifier = Callable[[DataParallel], protocols.GroupClassifier]
System = Callable[[DataParallel], Parts]


def head(dp: DataParallel) -> protocols.GroupClassifier:
    return CriticHead(lr=1e-2, detach_trunk=True)


def given(dp: DataParallel) -> protocols.GroupClassifier:
    return LabelledGroups(sources=("easy", "hard"))


def value_split(dp: DataParallel) -> protocols.GroupClassifier:
    return ValueSplit(dp=dp)


def random_groups(dp: DataParallel) -> protocols.GroupClassifier:
    return RandomGroups()


def ppo_kl(eta: float = 0.05) -> System:
    return lambda dp: (NoGroups(), NoVariance(), FixedKL(eta))


def gipo(groups: Classifier, eta: float = 0.05, **settings: Any) -> System:
    """The KL coefficient is over the weight; settings: of the regulariser."""
    return lambda dp: (groups(dp), GroupVariance(dp=dp, **settings), FixedKL(eta))


def adaptive(groups: Classifier, eta: float) -> System:
    """A KL coefficient for each group, whose mean is eta; all weights are 1."""
    return lambda dp: (groups(dp), NoVariance(), GroupAdaptiveKL(eta=eta, dp=dp))


def imitate(actor: TorchActor, target: Tensor, steps: int = 150) -> None:
    """Supervised: the policy becomes `target` [prompts, actions], as SFT would make it."""
    optimizer = torch.optim.Adam(actor.parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-(target * action_logits(actor).log_softmax(-1)).sum(1).mean()).backward()
        optimizer.step()
    for p in actor.parameters:
        p.grad = None


@lru_cache
def first_policy(spec: WorldSpec, seed: int) -> TorchActor:
    """Return the policy that training starts from. Do not change it: the next run starts there,
    too."""
    actor = TorchActor(VOCAB, HIDDEN, lr=LR, seed=1000 * seed, num_actions=NUM_ACTIONS)
    target = World.make(spec, [seed]).reference[0]
    if float(target.std()) > 0:  # the first weights give equal probabilities
        imitate(actor, target)
    return actor


def make(
    system: System, seed: int, spec: WorldSpec = PLAIN, clip: float = 0.8, anchor: str = "none"
) -> Bandit:
    """Everything but the three exchanged components is the same, and drawn alike, for every system
    of a seed. clip, anchor: of the reward."""
    dp = SingleReplica()
    world = World.make(spec, [seed])
    classifier, regulariser, controller = system(dp)
    reference = first_policy(spec, seed)
    actor = deepcopy(reference)
    ppo = PPO(
        epochs=2,
        critic_warmup=0,
        rollout=SamplingRollout(data_max_response=1, seed=seed),
        reward=ModelReward(
            missing_eos_penalty=0.0,  # a response is one action
            clip=clip,
            anchor=anchor,
            chosen=partial(chosen, world.gold[0]),
            reward_models={"reward": NoisyProxy(world, seed)},
            dp=dp,
        ),
        group_classifier=classifier,
        variance_regulariser=regulariser,
        kl_controller=controller,
        advantage=GeneralisedAdvantage(dp=dp),
        actor=actor,
        reference=reference,
        critic=TorchCritic(
            VOCAB, classifier.head, HIDDEN, LR, seed=1000 * seed + 100, group_hidden=HIDDEN
        ),
        dp=dp,
        minibatch=BATCH,
        prompts=lambda step: prompts_of(step, seed),
        examples=lambda step: all_prompts(),
        probe=all_prompts(),
        sources=("easy", "hard"),
        timer=lambda name: contextlib.nullcontext(),
    )
    return Bandit(world, actor, reference, ppo)


def train(bandit: Bandit, steps: int) -> list[StepResult]:
    return [bandit.ppo.step(step) for step in range(steps)]


def average(system: System, seeds: Iterable[int], steps: int, **setting: Any) -> Outcome:
    """Train one run for each seed; return the means of their outcomes. setting: of `make`."""
    found = []
    for seed in seeds:
        bandit = make(system, seed, **setting)
        train(bandit, steps)
        found.append(astuple(bandit.outcome()))
    return Outcome(*(fmean(column) for column in zip(*found, strict=True)))
