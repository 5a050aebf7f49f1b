"""GIPO in one file: the loop of gipo_megatron/algorithms/ppo.py on small models in plain PyTorch.

    python examples/ppo_loop.py [STEPS]

Half of the prompts are easy (8 of 20 tokens are right), half are hard (2 of 20). The policy learns
to respond with right tokens; PPO learns the easy half first. The critic's group head finds the two
halves without their names; trajectories of the group with the higher scores get smaller weights,
and are held closer to the reference. Runs in a few seconds on a CPU.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from gipo_megatron import ops
from gipo_megatron.local.roles import TorchActor, TorchCritic
from gipo_megatron.specs import HeadSpec, Sampling
from gipo_megatron.types import CriticOutput, Experience, Loss, Prompts, Rollout, TokenStats

ACTIONS, PROMPTS, ROWS, LENGTH = 20, 32, 128, 2  # tokens 0 … 19 are responses, 20 … 51 prompts
CLIP, VALUE_CLIP, GAMMA, LAM, EPOCHS = 0.2, 0.2, 1.0, 0.95, 2
KL_COEFFICIENT, KL_FLOOR, BETA, BETA_CRITIC, MAX_WEIGHT = 0.05, 0.1, 0.3, 1.0, 3.0


def right_tokens() -> Tensor:
    """Return the right tokens of each prompt, bool [PROMPTS, ACTIONS]; token 0 ends a response."""
    right = torch.zeros(PROMPTS, ACTIONS, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for prompt in range(PROMPTS):
        order = 1 + torch.randperm(ACTIONS - 1, generator=generator)
        right[prompt, order[: 8 if prompt < PROMPTS // 2 else 2]] = True
    return right


def draw_prompts(step: int) -> Prompts:
    ids = torch.randint(PROMPTS, (ROWS,), generator=torch.Generator().manual_seed(step))
    return Prompts(
        tokens=ACTIONS + ids[:, None],
        lengths=torch.ones(ROWS, dtype=torch.int64),
        prompt_id=ids,
        sample_id=step * ROWS + torch.arange(ROWS),
        source=tuple("easy" if i < PROMPTS // 2 else "hard" for i in ids.tolist()),
        extras=({},) * ROWS,
    )


def score(rollout: Rollout, right: Tensor) -> Tensor:
    """Return the share of right tokens among LENGTH, [B]."""
    response = torch.where(rollout.mask, rollout.tokens, 0)[:, 1:]
    return right[rollout.prompt_id].gather(1, response).float().sum(1) / LENGTH


def critic_loss(output: CriticOutput, batch: Experience) -> Loss:
    assert batch.values is not None and output.group_logits is not None
    value = ops.clipped_value_loss(output.values, batch.values, batch.returns, VALUE_CLIP)
    gain = (batch.group_loss_coefficients * output.group_logits.softmax(-1)).sum()
    return Loss(
        {
            "value": (ops.sequence_sum(value, batch.rollout.mask).sum(), "token"),
            "group": (-BETA_CRITIC * gain, "sequence"),
        }
    )


def actor_loss(output: TokenStats, batch: Experience) -> Loss:
    weighted = batch.advantages * batch.weights[:, None]
    loss = ops.clipped_surrogate(output.logprobs, batch.logprobs, weighted, CLIP)
    return Loss({"policy": (ops.sequence_sum(loss, batch.rollout.mask).sum(), "token")})


def train(steps: int) -> dict[str, float]:
    """Train; print and return the mean score of the last ten iterations by source."""
    vocab, right = ACTIONS + PROMPTS, right_tokens()
    head = HeadSpec(num_groups=2, input="prompt", detach_trunk=True, lr=1e-2)
    actor = TorchActor(vocab, lr=3e-3, num_actions=ACTIONS)
    reference = TorchActor(vocab, num_actions=ACTIONS)
    critic = TorchCritic(vocab, head, lr=3e-3, group_hidden=32)
    seen: list[Tensor] = []  # all scores so far
    mean_score: list[float | None] = [None, None]  # of each group, an exponential mean
    recent: dict[str, list[float]] = {"easy": [], "hard": []}

    for step in range(steps):
        # 1 rollout, 2 score
        sampling = Sampling(max_response=LENGTH, step=step)
        rollout = actor.generate(draw_prompts(step), sampling)
        raw, mask = score(rollout, right), rollout.mask
        seen.append(raw)
        standardised = ops.standardised_scores(raw, float(raw.mean()), float(torch.cat(seen).std()))

        # 3 evaluate, 4 groups: soft labels and the mean score R_g of each group
        old, ref = actor.logprobs(rollout).logprobs, reference.logprobs(rollout).logprobs
        output = critic.evaluate(rollout)
        assert output.group_logits is not None
        labels = output.group_logits.softmax(-1)
        r, masses, overall, count = ops.group_means(ops.group_sums(labels, standardised))
        high = 0 if (mean_score[0] or 0.0) >= (mean_score[1] or 0.0) else 1

        # 5 reward: the score on the last token, minus a KL penalty that is larger for easy data
        share = labels[:, high] / labels[:, high].mean()
        coefficients = KL_COEFFICIENT * share.clamp(min=KL_FLOOR)
        rewards = ops.add_on_last_token(-coefficients[:, None] * (old - ref), mask, raw)

        # 6 advantages, 7 weights: below 1 for the group that is ahead
        advantages, returns = ops.gae(rewards, output.values, mask, GAMMA, LAM)
        advantages = ops.whiten(advantages, mask, reduce=lambda x: x)
        weights = ops.group_weights(labels, r, masses / count, overall, BETA, "mass")
        experience = Experience(
            rollout=rollout,
            logprobs=old,
            values=output.values,
            advantages=advantages,
            returns=returns,
            weights=weights.clamp(0, MAX_WEIGHT).float(),
            group_probs=labels,
            group_loss_coefficients=ops.group_loss_coefficients(
                standardised, r, masses, count, "mass"
            ).float(),
        )

        # 8 updates: each role calls its loss back and makes one optimizer step
        for _ in range(EPOCHS):
            critic.update((experience, critic_loss))
            actor.update((experience, actor_loss))

        # 9 observe: which group is the high one
        for g in range(2):
            now = float((labels[:, g] * raw).sum() / labels[:, g].sum())
            mean_score[g] = now if mean_score[g] is None else 0.9 * mean_score[g] + 0.1 * now
        easy = torch.tensor([source == "easy" for source in rollout.source])
        recent["easy"].append(float(raw[easy].mean()))
        recent["hard"].append(float(raw[~easy].mean()))
        if (step + 1) % 10 == 0:
            figures = {"score": raw, "p_high": labels[:, high], "weight": experience.weights}
            text = "   ".join(
                f"{name} {float(x[easy].mean()):.2f} / {float(x[~easy].mean()):.2f}"
                for name, x in figures.items()
            )
            print(f"step {step + 1:4d}   easy / hard:   {text}")
    return {source: sum(values[-10:]) / len(values[-10:]) for source, values in recent.items()}


if __name__ == "__main__":
    print(train(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
