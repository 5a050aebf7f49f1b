"""The planted contextual bandit of algorithm.md section 9, run through the real PPO page and the
real components.

A prompt is one token, a response one of 50 tokens. Half the prompts are easy (15 rewarded actions),
half hard (2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components import protocols
from gipo_megatron.components.advantage import GeneralisedAdvantage
from gipo_megatron.components.groups import CriticHead, LabelledGroups, NoGroups
from gipo_megatron.components.kl import FixedKL, NoKL
from gipo_megatron.components.reward import ModelReward
from gipo_megatron.components.rollout import SamplingRollout
from gipo_megatron.components.variance import GroupVariance, NoVariance, ReturnVariance
from gipo_megatron.local.roles import TorchActor, TorchCritic
from gipo_megatron.roles import DataParallel, SingleReplica
from gipo_megatron.specs import HeadSpec
from gipo_megatron.types import Prompts, Sequences, StepResult

NUM_PROMPTS, NUM_ACTIONS, BATCH = 64, 50, 256
VOCAB = NUM_ACTIONS + NUM_PROMPTS  # actions are tokens 0 … 49, prompts the tokens after them
EASY_ACTIONS, HARD_ACTIONS, HACKS = 15, 2, 3
NOISE = 0.3


@dataclass(frozen=True)
class World:
    """gold and proxy [prompts, actions]: mean rewards; they differ only where there are hacks."""

    gold: Tensor
    proxy: Tensor

    @staticmethod
    def make(seed: int, hacks: int = 0) -> World:
        """`hacks` actions of every easy prompt score +1 with the proxy and -1 with gold."""
        generator = torch.Generator().manual_seed(10_000 + seed)
        gold = torch.zeros(NUM_PROMPTS, NUM_ACTIONS)
        proxy = torch.zeros(NUM_PROMPTS, NUM_ACTIONS)
        for prompt in range(NUM_PROMPTS):
            order = torch.randperm(NUM_ACTIONS, generator=generator)
            easy = is_easy(prompt)
            good = order[: EASY_ACTIONS if easy else HARD_ACTIONS]
            gold[prompt, good] = proxy[prompt, good] = 1.0
            if easy and hacks:
                bad = order[-hacks:]
                gold[prompt, bad], proxy[prompt, bad] = -1.0, 1.0
        return World(gold, proxy)


def is_easy(prompt: int) -> bool:
    return prompt < NUM_PROMPTS // 2


class NoisyProxy:
    """A reward model: the proxy's mean plus noise that is a pure function of (seed, sample_id)."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed

    def score(self, batch: Any) -> Tensor:
        sample_id = int(batch.sample_id[0])
        generator = torch.Generator().manual_seed(77_000_000 + self.seed * 1_000_003 + sample_id)
        noise = NOISE * torch.randn(len(batch), generator=generator)
        action = batch.tokens[:, 1]
        return self.world.proxy[batch.prompt_id, action] + noise


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


@dataclass
class Bandit:
    """One system on one world; `ppo.step(k)` is the real algorithm."""

    world: World
    actor: TorchActor
    ppo: PPO

    @torch.no_grad()
    def policy(self) -> Tensor:
        """[prompts, actions]"""
        tokens = torch.stack(
            [torch.arange(NUM_PROMPTS) + NUM_ACTIONS, torch.zeros(NUM_PROMPTS, dtype=torch.int64)],
            1,
        )
        return self.actor.logits(tokens)[:, 1].softmax(-1)

    def value(self) -> tuple[float, float]:
        """True (gold) mean reward of the easy and of the hard half."""
        expected = (self.policy() * self.world.gold).sum(1)
        return float(expected[: NUM_PROMPTS // 2].mean()), float(
            expected[NUM_PROMPTS // 2 :].mean()
        )


Parts = tuple[protocols.GroupClassifier, protocols.VarianceRegulariser, protocols.KLController]


def ppo_no_kl(dp: DataParallel) -> Parts:
    return NoGroups(), NoVariance(), NoKL()


def ppo_kl(dp: DataParallel) -> Parts:
    return NoGroups(), NoVariance(), FixedKL(0.05)


def gipo_prompt(dp: DataParallel) -> Parts:
    return CriticHead(lr=1e-2, detach_trunk=True), GroupVariance(beta=0.3), FixedKL(0.05)


def oracle(dp: DataParallel) -> Parts:
    return LabelledGroups(sources=("easy", "hard")), GroupVariance(beta=0.3), FixedKL(0.05)


def no_groups(dp: DataParallel) -> Parts:
    return NoGroups(), ReturnVariance(beta=0.1), FixedKL(0.05)


SYSTEMS: dict[str, Callable[[DataParallel], Parts]] = {
    "ppo_no_kl": ppo_no_kl,
    "ppo_kl": ppo_kl,
    "gipo_prompt": gipo_prompt,
    "oracle": oracle,
    "no_groups": no_groups,
}


def imitate(actor: TorchActor, target: Tensor, steps: int = 150) -> None:
    """Supervised: the policy becomes `target` [prompts, actions], as SFT would make it."""
    tokens = torch.stack(
        [torch.arange(NUM_PROMPTS) + NUM_ACTIONS, torch.zeros(NUM_PROMPTS, dtype=torch.int64)], 1
    )
    optimizer = torch.optim.Adam(actor.parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-(target * actor.logits(tokens)[:, 1].log_softmax(-1)).sum(1).mean()).backward()
        optimizer.step()
    for p in actor.parameters:
        p.grad = None


def make(
    parts: Callable[[DataParallel], Parts],
    seed: int,
    hacks: int = 0,
    clip: float = 0.8,
    hidden: int = 64,
    hack_odds: float = 1.0,
) -> Bandit:
    """Everything but the three exchanged components is the same, and drawn alike, for every system
    of a seed.

    hack_odds < 1: policy and reference start as a policy that is uniform but for the hacks, which
    are that much rarer.
    """
    dp = SingleReplica()
    world = World.make(seed, hacks)
    classifier, regulariser, controller = parts(dp)
    head: HeadSpec | None = classifier.head
    actor = TorchActor(VOCAB, hidden, lr=3e-3, seed=1000 * seed, num_actions=NUM_ACTIONS)
    reference = TorchActor(VOCAB, hidden, seed=1000 * seed, num_actions=NUM_ACTIONS)
    if hack_odds < 1:
        odds = torch.where(world.gold < 0, hack_odds, 1.0)
        for policy in (actor, reference):
            imitate(policy, odds / odds.sum(1, keepdim=True))
    ppo = PPO(
        epochs=2,
        critic_warmup=0,
        rollout=SamplingRollout(data_max_response=1, seed=seed),
        reward=ModelReward(
            missing_eos_penalty=0.0,  # a response is one action
            clip=clip,
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
            VOCAB, head, hidden, lr=3e-3, seed=1000 * seed + 100, group_hidden=hidden
        ),
        dp=dp,
        minibatch=BATCH,
        prompts=lambda step: prompts_of(step, seed),
        examples=lambda step: all_prompts(),
        probe=all_prompts(),
        sources=("easy", "hard"),
        timer=lambda name: contextlib.nullcontext(),
    )
    return Bandit(world, actor, ppo)


def train(bandit: Bandit, steps: int) -> list[StepResult]:
    return [bandit.ppo.step(step) for step in range(steps)]
