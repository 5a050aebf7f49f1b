"""A small PPO over plain torch roles: several tokens a response, ragged lengths, two sources."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch

from gipo_megatron.algorithms.ppo import PPO
from gipo_megatron.components import protocols
from gipo_megatron.components.advantage import GeneralisedAdvantage
from gipo_megatron.components.reward import ModelReward
from gipo_megatron.components.rollout import SamplingRollout
from gipo_megatron.local.replicas import replica_rows
from gipo_megatron.local.roles import TorchActor, TorchCritic, TorchRewardModel
from gipo_megatron.roles import DataParallel
from gipo_megatron.types import Prompts, Rollout, Scores, Sequences

VOCAB, BATCH, RESPONSES = 12, 16, 4
SOURCES = ("easy", "hard")


def prompts_at(step: int, dp: DataParallel) -> Prompts:
    """This replica's rows of step `step`; two responses a prompt."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(100, (BATCH // 2,), generator=generator).repeat_interleave(2)
    lengths = 1 + ids % 3
    tokens = 1 + (ids[:, None] * 7 + torch.arange(3) * 5) % (VOCAB - 1)
    rows = Prompts(
        tokens=torch.where(torch.arange(3) < lengths[:, None], tokens, 0),
        lengths=lengths,
        prompt_id=ids,
        sample_id=step * BATCH + torch.arange(BATCH),
        source=tuple(SOURCES[i % 2] for i in ids.tolist()),
        extras=tuple({"prompt": f"prompt {i}"} for i in ids.tolist()),
    )
    return replica_rows(rows, dp)


def probe_rows(dp: DataParallel) -> Sequences:
    prompts = prompts_at(1000, dp)
    return Sequences(
        prompts.tokens,
        torch.zeros_like(prompts.tokens, dtype=torch.bool),
        prompts.lengths,
        prompts.lengths,
        prompts.prompt_id,
    )


def make_ppo(
    dp: DataParallel,
    classifier: protocols.GroupClassifier,
    regulariser: protocols.VarianceRegulariser,
    controller: protocols.KLController,
    micro_batch: int = 0,
    advantage: protocols.Advantage | None = None,
    **settings: Any,
) -> PPO:
    """PPO whose weights and draws depend on nothing but the step; settings are PPO's own keys. It
    has a critic if a component needs one."""
    advantage = advantage or GeneralisedAdvantage(dp=dp)
    needs = {role for part in (advantage, classifier) for role in getattr(part, "needs", ())}
    critic = TorchCritic(VOCAB, classifier.head, hidden=16, dp=dp, micro_batch=micro_batch)
    return PPO(
        **{"epochs": 2, "critic_warmup": 0, **settings},
        rollout=SamplingRollout(data_max_response=RESPONSES, seed=3),
        reward=ModelReward(
            missing_eos_penalty=0.1, reward_models={"reward": TorchRewardModel(VOCAB, dp=dp)}, dp=dp
        ),
        group_classifier=classifier,
        variance_regulariser=regulariser,
        kl_controller=controller,
        advantage=advantage,
        actor=TorchActor(VOCAB, hidden=16, init_std=0.3, dp=dp, micro_batch=micro_batch),
        reference=TorchActor(VOCAB, hidden=16, init_std=0.3, dp=dp),
        critic=critic if "critic" in needs else None,
        dp=dp,
        minibatch=BATCH // 2,
        prompts=lambda step: prompts_at(step, dp),
        examples=lambda step: _examples(step, dp),
        probe=probe_rows(dp),
        sources=SOURCES,
        timer=lambda name: contextlib.nullcontext(),
    )


def _examples(step: int, dp: DataParallel) -> Sequences:
    """SFT rows for ptx: the prompts' own last token as a response."""
    prompts = prompts_at(2000 + step, dp)
    mask = torch.zeros_like(prompts.tokens, dtype=torch.bool)
    mask[torch.arange(len(prompts)), prompts.lengths - 1] = True
    return Sequences(prompts.tokens, mask, prompts.lengths - 1, prompts.lengths, prompts.prompt_id)


def stored_rollout(ppo: PPO, step: int = 0) -> Rollout:
    return ppo.rollout.sample(ppo.actor, ppo.prompts(step), step)


def scores_of(raw: torch.Tensor, std: float = 1.0) -> Scores:
    """Scores that are given, without moments."""
    return Scores(raw=raw, shaped=raw, standardised_scores=raw, parts={}, std=std)


def rollout_of(sources: list[str], prompt_ids: list[int] | None = None) -> Rollout:
    """A rollout of which only ids and sources matter."""
    rows = len(sources)
    ids = torch.tensor(prompt_ids if prompt_ids is not None else list(range(rows)))
    return Rollout(
        tokens=torch.ones(rows, 3, dtype=torch.int64),
        mask=torch.tensor([[False, True, True]] * rows),
        prompt_lengths=torch.ones(rows, dtype=torch.int64),
        finished=torch.ones(rows, dtype=torch.bool),
        generation_logprobs=None,
        response_text=tuple(f"response {i}" for i in range(rows)),
        prompt_id=ids,
        sample_id=torch.arange(rows),
        source=tuple(sources),
        extras=tuple({"prompt": f"prompt {i}"} for i in range(rows)),
    )


def with_high_prob(groups: Any, value: float) -> Any:
    return replace(groups, high_prob=torch.full_like(groups.high_prob, value))
