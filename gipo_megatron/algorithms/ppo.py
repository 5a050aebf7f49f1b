"""PPO and GIPO: one page, read downward.

`variance_regulariser: none` with `kl_controller: fixed` is PPO with a KL penalty; GIPO is this same
page with two components exchanged; RLOO and GRPO exchange `advantage`, and then need no critic.
Step numbers are those of docs/algorithm.md, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

from gipo_megatron import ops
from gipo_megatron.algorithms import ppo_metrics
from gipo_megatron.algorithms.held_out import evaluate_policy
from gipo_megatron.algorithms.sft import negative_log_likelihood
from gipo_megatron.components import protocols
from gipo_megatron.components.reward import Reward
from gipo_megatron.components.tracker import GroupTracker, group_loss_coefficients
from gipo_megatron.metrics import Metric, Metrics, prefixed
from gipo_megatron.registry import (
    OneOf,
    Range,
    component,
    component_fields,
    from_runtime,
    register,
)
from gipo_megatron.roles import (
    Actor,
    Critic,
    DataParallel,
    HeldOut,
    Reference,
    RewardModel,
    Stateful,
    Trainable,
    gather_rows,
)
from gipo_megatron.specs import Sampling
from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import (
    BatchLoss,
    CriticOutput,
    Experience,
    Groups,
    Loss,
    Prompts,
    Rollout,
    Rows,
    Scores,
    Sequences,
    StepResult,
    TokenStats,
    Update,
    skipped_rows,
)

Positive = Annotated[float, Range(0, open=True)]
NotNegative = Annotated[float, Range(0)]
Part = tuple[Rows, BatchLoss]
# a row's numbers that must be finite
NUMBERS = (
    "scores",
    "log probs",
    "reference log probs",
    "values",
    "group logits",
    "correction weights",
)


@register("algorithm", "ppo")
@dataclass
class PPO:
    """Proximal policy optimisation from a reward model, with groups (Schulman et al. 2017; Zheng et
    al. 2024)."""

    data: ClassVar[str] = "prompt"
    stage: ClassVar[str] = "PPO"
    trained: ClassVar[tuple[str, ...]] = ("actor", "critic")
    headline: ClassVar[tuple[tuple[str, str], ...]] = (
        ("eval/score", "held-out score"),
        ("eval/gold", "held-out gold"),
        ("reward/score_mean", "score"),
    )

    clip: Positive = 0.2
    value_clip: Positive = 0.2
    epochs: Annotated[int, Range(1)] = 1
    # iterations with the actor frozen; without a critic there are none
    critic_warmup: Annotated[int, Range(0)] = 20
    entropy: NotNegative = 0.0  # weight of the entropy bonus, per token
    ptx: NotNegative = 0.0  # weight of the SFT loss mixed into the actor's updates
    # in the reward; as a reward, k2 and k3 optimise another functional than the KL divergence
    kl_estimator: Annotated[str, OneOf("k1", "k2", "k3")] = "k1"

    rollout: protocols.Sampler = component("rollout", "sampling")
    reward: Reward = component("reward", "model")
    group_classifier: protocols.GroupClassifier = component("group_classifier", "none")
    variance_regulariser: protocols.VarianceRegulariser = component("variance_regulariser", "none")
    kl_controller: protocols.KLController = component("kl_controller", "fixed")
    advantage: protocols.Advantage = component("advantage", "gae")

    actor: Actor = from_runtime("actor")
    reference: Reference = from_runtime("reference")
    critic: Critic | None = from_runtime("critic", optional=True)
    gold: RewardModel | None = from_runtime("gold", optional=True)  # scores held-out responses
    dp: DataParallel = from_runtime("dp")
    minibatch: int = from_runtime("minibatch")  # sequences per optimizer step, global
    prompts: Callable[[int], Prompts] = from_runtime("prompts")  # step -> this replica's rows
    # optimizer step -> SFT rows for ptx
    examples: Callable[[int], Sequences] = from_runtime("examples")
    probe: Sequences = from_runtime("probe")  # fixed prompts on which label flips are counted
    sources: tuple[str, ...] = from_runtime("sources")
    held_out: HeldOut = from_runtime("held_out")
    sampling: Sampling = from_runtime("sampling")  # of held-out responses
    timer: Callable[[str], AbstractContextManager[None]] = from_runtime("timer")

    def step(self, step: int) -> StepResult:
        """Run one iteration: a rollout, and every optimizer step on it."""
        with self.timer("rollout"):  # 1
            rollout = self.rollout.sample(self.actor, self.prompts(step), step)
        with self.timer("score"):  # 2
            scores = self.reward.score(rollout)
        with self.timer("evaluate"):  # 3: by the training forward, never the inference kernel
            old = self.actor.logprobs(rollout).logprobs
            reference = self.reference.logprobs(rollout).logprobs
            values, logits = self._criticise(rollout)
        drawn = self.rollout.token_weights(old, rollout)
        if skipped := self._skipped(rollout, scores.raw, old, reference, values, logits, drawn):
            return skipped

        mask = rollout.mask
        groups, learned = self._groups(logits, values, rollout, scores)  # 4
        weights = self.variance_regulariser.weights(groups)  # 5
        coefficients = self.kl_controller.kl_coefficients(groups)  # 6
        kl = torch.where(mask, ops.kl_estimate(old, reference, self.kl_estimator), 0.0)
        penalty = (coefficients / weights.kl_divisor)[:, None] * kl
        rewards = ops.add_on_last_token(-penalty, mask, scores.shaped)
        advantages, returns = self.advantage.estimate(rewards, values, rollout)  # 7
        experience = Experience(
            rollout=rollout,
            logprobs=old,
            values=values,
            advantages=advantages * drawn,  # the tokens may come from another policy than `old`
            returns=returns,
            weights=weights.values,
            group_probs=groups.probs,
            group_loss_coefficients=group_loss_coefficients(learned, groups.probs),
        )
        with self.timer("update"):  # 8
            critic_update = self._update(self.critic, experience, self.critic_loss)
            head_update = self._update(self._own_head, experience, self.group_loss)
            actor = None if self.critic is not None and step < self.critic_warmup else self.actor
            sft = self._sft_parts(experience, step)
            actor_update = self._update(actor, experience, self.actor_loss, sft)
        response_kl = ops.sequence_sum(old - reference, mask)  # k1, nats per response
        observed = self._observe(groups, learned, scores, response_kl)  # 9
        metrics = {
            **ppo_metrics.rollout_metrics(rollout, old, self.rollout.correction_cap, self.dp),
            **ppo_metrics.score_metrics(scores, rollout, self.dp),
            **ppo_metrics.kl_metrics(response_kl, coefficients),
            **ppo_metrics.group_metrics(groups, scores, rollout, response_kl),
            **ppo_metrics.split_metrics(learned or groups, scores, rollout, self.sources, self.dp),
            **ppo_metrics.source_metrics(groups, scores, rollout, response_kl, self.sources),
            **ppo_metrics.weight_metrics(weights),
            **ppo_metrics.value_metrics(experience, critic_update),
            **prefixed("policy", actor_update.metrics),
            **prefixed("group_head", head_update.metrics),
            **observed,
        }
        return StepResult(
            metrics,
            ppo_metrics.sample_rows(rollout, scores, groups, weights, response_kl),
            skipped_rows(critic=critic_update, group_head=head_update, actor=actor_update),
            tokens=int(rollout.lengths.sum()),
            forward_equivalents=self._forward_equivalents() + ("anchor" in scores.parts),
        )

    def evaluate(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """Return metrics and sample rows of responses to held-out prompts."""
        trained = replace(  # the distribution whose log-probs are computed
            self.sampling,
            temperature=self.rollout.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
        )
        return evaluate_policy(
            self.rollout,
            self.actor,
            self.reference,
            self.reward,
            self.gold,
            self.held_out,
            self.sources,
            self.sampling,
            trained,
        )

    # ------------------------------------------------------------------------------ critic, groups

    def _criticise(self, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
        """Return values [B, T] and group logits [B, M]; None without a critic, or without a group
        head."""
        values, logits = None, None
        if self.critic is not None:
            output = self.critic.evaluate(rows)
            values, logits = output.values, output.group_logits
        if self._own_head is not None:
            logits = self._own_head.logits(rows)
        return values, logits

    @property
    def _own_head(self) -> protocols.OwnHead | None:
        """The group classifier, if it has a head that is not on the critic."""
        classifier = self.group_classifier
        return classifier if isinstance(classifier, protocols.OwnHead) else None

    @property
    def _reads_prompts(self) -> bool:
        """Check for a head whose labels are defined without a response, as on the probe."""
        head = self.group_classifier.head or self._own_head
        return head is not None and head.input == "prompt"

    def _forward_equivalents(self) -> int:
        """Generation, actor, reference, reward, actor's training; the critic once, and its
        training; the trunk under a head that is not on the critic."""
        passes = 4 + 3 * self.epochs
        if self.critic is not None:
            passes += 1 + 3 * self.epochs
        if self._own_head is not None:
            passes += 1 + self.epochs
        return passes

    @cached_property
    def tracker(self) -> GroupTracker:
        """Of the groups that the weights and KL coefficients use."""
        classifier = self.group_classifier
        return GroupTracker(classifier.num_groups, classifier.variance, self.dp)

    @cached_property
    def observer(self) -> GroupTracker | None:
        """Of the labels of a head that learns beside given labels."""
        classifier = self.group_classifier
        if classifier.head is None or not classifier.head.observes:
            return None
        return GroupTracker(classifier.num_groups, classifier.variance, self.dp)

    def _groups(
        self, logits: Tensor | None, values: Tensor | None, rollout: Rollout, scores: Scores
    ) -> tuple[Groups, Groups | None]:
        """Return the groups that weights and KL coefficients use, and those of a head's labels."""
        labels = self.group_classifier.probs(logits, values, rollout)
        groups = self.tracker.measure(labels, scores)
        return groups, self._learned_groups(groups, logits, scores)

    def _learned_groups(
        self, groups: Groups, logits: Tensor | None, scores: Scores
    ) -> Groups | None:
        """Return the groups of the head's own labels; None without a head."""
        if logits is None:
            return None
        if self.observer is None:
            return groups
        return self.observer.measure(logits.softmax(-1), scores)

    # -------------------------------------------------------------------------- stage 1 and stage 2

    def _minibatches(self, experience: Experience) -> Iterator[tuple[int, Experience]]:
        """Yield contiguous blocks of the global batch, in order; the same blocks every epoch."""
        size = self.minibatch // self.dp.size
        for epoch in range(self.epochs):
            for index, start in enumerate(range(0, len(experience), size)):
                yield (
                    epoch * (len(experience) // size) + index,
                    experience.block(start, start + size),
                )

    def _update(
        self,
        role: Trainable | None,
        experience: Experience,
        loss: BatchLoss,
        more: Callable[[int], list[Part]] = lambda index: [],
    ) -> Update:
        """Make all optimizer steps of one role; return their metrics and skipped rows together.

        The role's pipeline calls `loss` once for every micro-batch, on the last stage, and runs its
        backward pass. more: parts to add to optimizer step `index` of this iteration.
        """
        total = Update({})
        if role is not None:
            for index, batch in self._minibatches(experience):
                total = total.merge(role.update((batch, loss), *more(index)))
        return total

    def _sft_parts(self, experience: Experience, step: int) -> Callable[[int], list[Part]]:
        """Return the function that gives the SFT rows of an optimizer step; none where ptx is 0."""
        if self.ptx == 0:
            return lambda index: []
        updates = self.epochs * len(experience) * self.dp.size // self.minibatch
        return lambda index: [(self.examples(step * updates + index), self.ptx_loss)]

    def critic_loss(self, output: CriticOutput, batch: Experience) -> Loss:
        """Clipped value loss per token - beta_critic (sum_g c_ig p_ig + entropy H(p_i)) per
        sequence (algorithm.md 2.2, stage 1)."""
        mask = batch.rollout.mask
        assert batch.values is not None
        value = ops.sequence_sum(
            ops.clipped_value_loss(output.values, batch.values, batch.returns, self.value_clip),
            mask,
        ).sum()
        terms = {"value": (value, "token")}
        if output.group_logits is not None:
            head = self.group_classifier.head
            assert head is not None
            gain = self._group_gain(output.group_logits, batch, head.entropy)
            terms["group"] = (-head.loss_weight * gain, "sequence")
        return Loss(terms, {"loss": Metric.ratio(value, mask.sum())})

    def group_loss(self, logits: Tensor, batch: Experience) -> Loss:
        """-(sum_g c_ig p_ig + entropy H(p_i)) per sequence, of a head that is not on the critic."""
        assert self._own_head is not None
        gain = self._group_gain(logits, batch, self._own_head.entropy)
        return Loss({"group": (-gain, "sequence")}, {"loss": Metric.ratio(-gain, len(batch))})

    def _group_gain(self, logits: Tensor, batch: Experience, entropy: float) -> Tensor:
        p = logits.softmax(-1)
        return (batch.group_loss_coefficients * p).sum() + entropy * torch.special.entr(p).sum()

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
        metrics = {"ptx": Metric.ratio(nll, batch.mask.sum())}
        return Loss({"ptx": (self.ptx * nll, "token")}, metrics)

    # ---------------------------------------------------------------------------------------- state

    def _observe(
        self, groups: Groups, learned: Groups | None, scores: Scores, response_kl: Tensor
    ) -> Metrics:
        """Advance every memory by one iteration, but the reward's moments; return their metrics."""
        probe_logits = self._criticise(self.probe)[1] if self._reads_prompts else None
        count = response_kl.new_tensor(len(response_kl), dtype=torch.float64)
        kl = self.dp.sum(torch.stack([response_kl.double().sum(), count]))
        used_logits = None if self.observer is not None else probe_logits
        metrics = self.tracker.observe(groups, scores, used_logits)
        if self.observer is not None and learned is not None:
            beside = self.observer.observe(learned, scores, probe_logits)
            metrics["groups/flip_rate"] = beside["groups/flip_rate"]
        for part in (self.variance_regulariser, self.kl_controller):
            if isinstance(part, protocols.Observer):
                metrics |= part.observe(groups, float(kl[0] / kl[1]))
        return metrics

    def _skipped(self, rollout: Rollout, *numbers: Tensor | None) -> StepResult | None:
        """Return the result of an iteration without updates, where a row [B, …] of `numbers` (those
        of NUMBERS), on any replica, holds a NaN or an infinity; else None."""
        ids = gather_rows(rollout.sample_id, self.dp)
        skipped: dict[str, tuple[int, ...]] = {}
        for name, x in zip(NUMBERS, numbers, strict=True):
            if x is not None:
                bad = gather_rows(~torch.isfinite(x.reshape(len(x), -1)).all(1), self.dp)
                if rows := tuple(int(i) for i in ids[bad > 0].tolist()):
                    skipped[f"no update, {name} that are not finite"] = rows
        count = len({row for rows in skipped.values() for row in rows})
        metrics = {"reward/non_finite": Metric.mean(float(count))}
        return StepResult(metrics, skipped=skipped) if skipped else None

    def _memory(self) -> dict[str, Stateful]:
        parts = {f.name: getattr(self, f.name) for f in component_fields(type(self))}
        parts |= {"groups": self.tracker, "observer": self.observer}
        return {name: part for name, part in parts.items() if isinstance(part, Stateful)}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._memory().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._memory().items():
            part.load_state_dict(state[name])
