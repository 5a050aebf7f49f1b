"""PPO and GIPO: one page, read downward.

`variance_regulariser: none` with `kl_controller: fixed` is PPO with a KL price; GIPO is this same
page with two components exchanged. Step numbers are those of docs/algorithm.md, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.algorithms import ppo_metrics
from gipo_megatron.algorithms.sft import negative_log_likelihood
from gipo_megatron.components import protocols
from gipo_megatron.recipe.registry import OneOf, Range, component, from_runtime, register
from gipo_megatron.roles import Actor, Critic, DataParallel, Reference, gather_rows
from gipo_megatron.types import (
    CriticOutput,
    Experience,
    Groups,
    Loss,
    Metric,
    Metrics,
    Prompts,
    Sequences,
    StepResult,
    TokenStats,
    merge_metrics,
    prefixed,
)

Positive = Annotated[float, Range(0, open=True)]
NotNegative = Annotated[float, Range(0)]


@register("algorithm", "ppo")
@dataclass
class PPO:
    """Proximal policy optimisation from a reward model, with groups (Schulman et al. 2017; Zheng et
    al. 2024)."""

    trained: ClassVar[tuple[str, ...]] = ("actor", "critic")

    clip: Positive = 0.2
    value_clip: Positive = 0.2
    epochs: Annotated[int, Range(1)] = 1
    critic_warmup: Annotated[int, Range(0)] = 20  # iterations with the actor frozen
    entropy: NotNegative = 0.0  # weight of the entropy bonus, per token
    ptx: NotNegative = 0.0  # weight of the SFT loss mixed into the actor's updates
    kl_estimator: Annotated[str, OneOf("k1", "k2", "k3")] = "k1"

    rollout: protocols.Sampler = component("rollout", "sampling")
    reward: protocols.Reward = component("reward", "model")
    group_classifier: protocols.GroupClassifier = component("group_classifier", "none")
    variance_regulariser: protocols.VarianceRegulariser = component("variance_regulariser", "none")
    kl_controller: protocols.KLController = component("kl_controller", "fixed")
    advantage: protocols.Advantage = component("advantage", "gae")

    actor: Actor = from_runtime("actor")
    reference: Reference = from_runtime("reference")
    critic: Critic = from_runtime("critic")
    dp: DataParallel = from_runtime("dp")
    minibatch: int = from_runtime("minibatch")  # sequences per optimizer step, global
    prompts: Callable[[int], Prompts] = from_runtime("prompts")  # step -> this replica's rows
    # optimizer step -> SFT rows for ptx
    examples: Callable[[int], Sequences] = from_runtime("examples")
    probe: Sequences = from_runtime("probe")  # fixed prompts on which label flips are counted
    sources: tuple[str, ...] = from_runtime("sources")
    phase: Callable[[str], AbstractContextManager[None]] = from_runtime("phase")

    def step(self, step: int) -> StepResult:
        """One iteration: a rollout, and every optimizer step made on it."""
        with self.phase("rollout"):  # 1
            rollout = self.rollout.sample(self.actor, self.prompts(step), step)
        mask = rollout.mask
        with self.phase("score"):  # 2
            scores = self.reward.score(rollout)
        with self.phase("evaluate"):  # 1, 3: the training forward, never the inference kernel
            old = self.actor.logprobs(rollout).logprobs
            reference = self.reference.logprobs(rollout).logprobs
            critic = self.critic.evaluate(rollout)
        if bad := self._non_finite(rollout.sample_id, scores.raw, old, reference, critic.values):
            return StepResult(
                {"reward/non_finite": Metric.mean(float(len(bad)))}, skipped={"rollout": bad}
            )

        groups = self.group_classifier.assign(critic.group_logits, rollout, scores)
        coefficients = self.kl_controller.coefficients(groups)  # 4: [B], the price of a nat
        kl = torch.where(mask, ops.kl_estimate(old, reference, self.kl_estimator), 0.0)
        rewards = ops.add_on_last_token(-coefficients[:, None] * kl, mask, scores.shaped)
        advantages, returns = self.advantage.estimate(rewards, critic.values, mask)  # 5

        experience = Experience(
            rollout=rollout,
            logprobs=old,
            values=critic.values,
            advantages=advantages,
            returns=returns,
            weights=torch.ones_like(scores.raw),
            group_probs=groups.probs,
            group_coefficients=self.group_classifier.coefficients(groups),
        )
        skipped: dict[str, tuple[int, ...]] = {}
        with self.phase("update"):
            value_metrics = self._update_critic(experience, skipped)  # 6
            if self.group_classifier.relabel:
                groups = self.group_classifier.assign(
                    self.critic.evaluate(rollout).group_logits, rollout, scores
                )
            weights = self.variance_regulariser.weights(groups)  # 7
            experience = replace(experience, weights=weights.values, group_probs=groups.probs)
            # 8
            policy_metrics = (
                self._update_actor(experience, step, skipped) if step >= self.critic_warmup else {}
            )

        # 9: k1, nats per response, whatever the price is computed from
        response_kl = ops.sequence_sum(old - reference, mask)
        metrics = {
            **ppo_metrics.rollout_metrics(rollout, old, self.dp),
            **ppo_metrics.score_metrics(scores),
            **ppo_metrics.kl_metrics(response_kl, coefficients),
            **ppo_metrics.group_metrics(groups, scores, rollout, response_kl),
            **ppo_metrics.split_metrics(groups, scores, rollout, self.sources, self.dp),
            **ppo_metrics.source_metrics(groups, scores, rollout, response_kl, self.sources),
            **ppo_metrics.weight_metrics(weights),
            **prefixed(
                "value",
                {
                    "explained_variance": Metric.explained_variance(
                        returns[mask], critic.values[mask]
                    ),
                    **value_metrics,
                },
            ),
            **prefixed("policy", policy_metrics),
            **self._observe(groups, scores, response_kl),
        }
        samples = ppo_metrics.sample_rows(rollout, scores, groups, weights, response_kl)
        # generation, actor, reference, critic, reward; two models trained
        passes = 5 + 6 * self.epochs
        return StepResult(metrics, samples, skipped, int(rollout.lengths.sum()), passes)

    # -------------------------------------------------------------------------- stage 1 and stage 2

    def _minibatches(self, experience: Experience) -> Iterator[tuple[int, Experience]]:
        """Contiguous blocks of the global batch, in order; the same blocks every epoch."""
        size = self.minibatch // self.dp.size
        for epoch in range(self.epochs):
            for index, start in enumerate(range(0, len(experience), size)):
                yield (
                    epoch * (len(experience) // size) + index,
                    experience.block(start, start + size),
                )

    def _update_critic(
        self, experience: Experience, skipped: dict[str, tuple[int, ...]]
    ) -> Metrics:
        metrics: Metrics = {}
        for _, batch in self._minibatches(experience):
            update = self.critic.update((batch, self.critic_loss))
            metrics = merge_metrics(metrics, update.metrics)
            if update.skipped is not None:
                skipped["critic"] = skipped.get("critic", ()) + update.skipped
        return metrics

    def _update_actor(
        self, experience: Experience, step: int, skipped: dict[str, tuple[int, ...]]
    ) -> Metrics:
        metrics: Metrics = {}
        updates = self.epochs * len(experience) * self.dp.size // self.minibatch
        for index, batch in self._minibatches(experience):
            parts: list[Any] = [(batch, self.actor_loss)]
            if self.ptx > 0:
                parts.append((self.examples(step * updates + index), self.ptx_loss))
            update = self.actor.update(*parts)
            metrics = merge_metrics(metrics, update.metrics)
            if update.skipped is not None:
                skipped["actor"] = skipped.get("actor", ()) + update.skipped
        return metrics

    def critic_loss(self, output: CriticOutput, batch: Experience) -> Loss:
        """Clipped value loss per token - beta_critic sum_g c_ig p_ig per sequence (algorithm.md
        2.2, stage 1)."""
        mask = batch.rollout.mask
        value = ops.sequence_sum(
            ops.clipped_value_loss(output.values, batch.values, batch.returns, self.value_clip),
            mask,
        ).sum()
        terms = {"value": (value, "token")}
        if output.group_logits is not None:
            gain = (batch.group_coefficients * output.group_logits.softmax(-1)).sum()
            terms["group"] = (-self.group_classifier.beta_critic * gain, "sequence")
        return Loss(
            terms,
            {"loss": Metric("mean", torch.stack([value.detach().double(), mask.sum().double()]))},
        )

    def actor_loss(self, output: TokenStats, batch: Experience) -> Loss:
        """Clipped surrogate on w_i A_t per token, minus the entropy bonus (algorithm.md 2.2, stage
        2)."""
        mask = batch.rollout.mask
        loss = ops.clipped_surrogate(
            output.logprobs, batch.logprobs, batch.advantages * batch.weights[:, None], self.clip
        )
        terms = {"policy": (ops.sequence_sum(loss, mask).sum(), "token")}
        if self.entropy > 0:
            assert output.entropy is not None
            terms["entropy"] = (
                -self.entropy * ops.sequence_sum(output.entropy, mask).sum(),
                "token",
            )
        return Loss(terms, ppo_metrics.policy_metrics(loss, output, batch, self.clip))

    def ptx_loss(self, output: TokenStats, batch: Sequences) -> Loss:
        nll = negative_log_likelihood(output, batch)
        return Loss(
            {"ptx": (self.ptx * nll, "token")},
            {
                "ptx": Metric(
                    "mean", torch.stack([nll.detach().double(), batch.mask.sum().double()])
                )
            },
        )

    # ---------------------------------------------------------------------------------------- state

    def _observe(self, groups: Groups, scores: Any, response_kl: Tensor) -> Metrics:
        """Whatever has memory moves on once an iteration, here."""
        probe = (
            self.critic.evaluate(self.probe).group_logits
            if self.group_classifier.head is not None
            else None
        )
        kl = self.dp.sum(
            torch.stack(
                [
                    response_kl.double().sum(),
                    response_kl.new_tensor(len(response_kl), dtype=torch.float64),
                ]
            )
        )
        metrics = self.group_classifier.observe(groups, scores, probe)
        self.variance_regulariser.observe(groups)
        return {**metrics, **self.kl_controller.observe(groups, float(kl[0] / kl[1]))}

    def _non_finite(self, sample_id: Tensor, *tensors: Tensor) -> tuple[int, ...]:
        """Sample ids, over all replicas, of rows that hold a NaN or an infinity."""
        bad = torch.stack([~torch.isfinite(x.reshape(len(x), -1)).all(1) for x in tensors]).any(0)
        everywhere, ids = gather_rows(bad, self.dp), gather_rows(sample_id, self.dp)
        return tuple(int(i) for i in ids[everywhere > 0].tolist())

    def _memory(self) -> dict[str, Any]:
        return {
            "reward": self.reward,
            "group_classifier": self.group_classifier,
            "variance_regulariser": self.variance_regulariser,
            "kl_controller": self.kl_controller,
        }

    def state_dict(self) -> dict[str, Any]:
        return {slot: memory.state_dict() for slot, memory in self._memory().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for slot, memory in self._memory().items():
            memory.load_state_dict(state[slot])
