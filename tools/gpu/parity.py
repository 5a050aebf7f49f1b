"""Part `parity`: a tiny model on the device against Hugging Face's on the CPU, in this process:
outputs, gradients, tokens.

fp32: only the order of sums differs. bf16: both round, each in its own places, so gradients are
held to Hugging Face's own distance from fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from gipo_megatron.megatron.build import build_engine
from gipo_megatron.megatron.engine import Engine
from gipo_megatron.megatron.hf import load_hf
from gipo_megatron.megatron.roles import MegatronActor, MegatronCritic, MegatronRewardModel, outputs
from gipo_megatron.megatron.sampling import pick, uniforms
from gipo_megatron.specs import HeadSpec, Optimisation, Precision, Sampling
from gipo_megatron.types import Loss, Prompts, Rows
from tools.gpu import tiny
from tools.gpu.bench import Bench, Figure, below, equal, true

FP32 = 1e-4  # largest difference of an output, and relative error of a gradient
BF16 = 0.1  # mean difference of an output, with weights that are ten times a real model's
TIMES = 3.0  # bf16 gradients: relative error over Hugging Face's own (a CPU: 1.1 to 1.7)
LENGTHS, RESPONSE = (7, 3, 9, 1), 16


def parity(bench: Bench) -> Iterator[Figure]:
    model = tiny.hf_model()
    for dtype in ("fp32", "bf16"):
        yield from _outputs(bench, dtype, model)
        yield from _gradients(bench, dtype)
    yield from _tokens(bench, model)


def build(bench: Bench, role: str, dtype: str, group: HeadSpec | None = None) -> Engine:
    """A model with the tiny model's weights."""
    engine = build_engine(
        role,
        bench.mesh,
        tiny.ARCHITECTURE,
        Precision(dtype),
        micro_batch=2,
        optimisation=Optimisation(lr=1e-3),
        group=group,
    )
    weights = {name: p.detach() for name, p in tiny.hf_model().named_parameters()}
    if engine.head is not None:
        weights["score.weight"] = tiny.score_weight()
    load_hf(weights, engine.chunks, bench.mesh, tiny.ARCHITECTURE, head=engine.head)
    engine.weights_changed()
    return engine


def actor(bench: Bench, dtype: str) -> MegatronActor:
    return MegatronActor(build(bench, "actor", dtype), eos_id=1, pad_id=0, decode=str)


def critic(bench: Bench, dtype: str) -> MegatronCritic:
    engine = build(bench, "critic", dtype, tiny.GROUP)
    head = engine.group_head
    assert head is not None
    with torch.no_grad():
        for mine, given in zip(head.parameters(), tiny.group_weights(), strict=True):
            mine.copy_(given)
    return MegatronCritic(engine)


def reward(bench: Bench, dtype: str) -> MegatronRewardModel:
    return MegatronRewardModel(build(bench, "reward", dtype))


# ------------------------------------------------------------------------------------------ outputs


def _outputs(bench: Bench, dtype: str, model: LlamaForCausalLM) -> Iterator[Figure]:
    rows, pairs = tiny.weighted().inner, tiny.pairs().sequences
    with torch.no_grad():
        stats = tiny.hf_token_stats(model, rows)
        hidden = tiny.hf_hidden(model, rows)
        values = tiny.hf_critic(hidden, tiny.score_weight(), tiny.group_weights(), rows)
        scores = tiny.hf_scores(model, tiny.score_weight(), pairs)
        logits = model.lm_head(hidden)
    policy, judge = actor(bench, dtype), critic(bench, dtype)
    mine, states = policy.logprobs(rows, entropy=True), judge.evaluate(rows)
    real = torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
    gaps = {
        "logits": (outputs(policy.engine, rows.tokens), logits, real),
        "log-probs": (mine.logprobs, stats.logprobs, rows.mask),
        "entropies": (mine.entropy, stats.entropy, rows.mask),
        "values": (states.values, values.values, rows.mask),
        "group logits": (states.group_logits, values.group_logits, ...),
        "scores": (reward(bench, dtype).score(pairs), scores, ...),
    }
    for name, (ours, theirs, where) in gaps.items():
        assert ours is not None and theirs is not None
        gap = (ours.cpu().float() - theirs).abs()[where]
        if dtype == "fp32":
            yield below(f"fp32 {name}, largest gap", float(gap.max()), FP32)
        else:
            yield below(f"bf16 {name}, mean gap", float(gap.mean()), BF16)


# ---------------------------------------------------------------------------------------- gradients


def _gradients(bench: Bench, dtype: str) -> Iterator[Figure]:
    """The worst tensor's relative error."""
    cases: dict[str, tuple[Any, Rows, Callable[..., Loss]]] = {
        "actor": (actor(bench, dtype), tiny.weighted(), tiny.ppo_loss),
        "critic": (critic(bench, dtype), tiny.weighted(), tiny.critic_loss),
        "reward": (reward(bench, dtype), tiny.pairs(), tiny.pair_loss),
    }
    for kind, (role, rows, loss) in cases.items():
        plain = tiny.hf_gradients(kind)
        errors = relative(role, rows, loss, plain)
        worst = max(errors, key=lambda name: errors[name])
        if dtype == "fp32":
            yield below(f"fp32 {kind} gradients, {worst}", errors[worst], FP32)
            continue
        own = tiny.relative_errors(tiny.hf_gradients(kind, torch.bfloat16), plain)
        times = {name: error / own[name] for name, error in errors.items()}
        worst = max(times, key=lambda name: times[name])
        yield below(
            f"bf16 {kind} gradients, {worst}, over Hugging Face's error", times[worst], TIMES
        )


def relative(
    role: Any, rows: Rows, loss: Callable[..., Loss], plain: dict[str, Tensor]
) -> dict[str, float]:
    """Relative error of each tensor's gradient of the whole batch's loss."""
    _, bad = role.engine.backward([(rows, loss)], role.readout)
    assert bad == [], bad
    return tiny.relative_errors(
        {name: g.float().cpu() for name, g in role.engine.gradients()}, plain
    )


# ------------------------------------------------------------------------------------------- tokens


def prompts() -> Prompts:
    width, ids = max(LENGTHS), torch.arange(len(LENGTHS))
    tokens = torch.randint(2, tiny.VOCAB, (len(LENGTHS), width), generator=tiny.generator(0))
    tokens = torch.where(torch.arange(width) < torch.tensor(LENGTHS)[:, None], tokens, 0)
    return Prompts(
        tokens, torch.tensor(LENGTHS), ids, ids + 70, ("",) * len(LENGTHS), ({},) * len(LENGTHS)
    )


def _tokens(bench: Bench, model: LlamaForCausalLM) -> Iterator[Figure]:
    """Ragged prompts in fp32: each row is what Hugging Face's model gives it alone, on the CPU,
    with the same noise."""
    policy, given = actor(bench, "fp32"), prompts()
    for name, sampling in (
        ("greedy", Sampling(RESPONSE, temperature=0.0)),
        ("sampled", Sampling(RESPONSE, seed=5, step=3)),
    ):
        rollout = policy.generate(given, sampling)
        same = 0
        for row, length in enumerate(LENGTHS):
            count = int(rollout.response_lengths[row])
            same += rollout.tokens[row, length : length + count].tolist() == _alone(
                model, given, row, sampling
            )
        yield equal(f"fp32 {name} responses that are Hugging Face's", same, len(LENGTHS))
    assert rollout.generation_logprobs is not None
    gap = (policy.logprobs(rollout.sequences).logprobs - rollout.generation_logprobs).abs()[
        rollout.mask
    ]
    yield below(
        "fp32 log-probs of the sampler against the training forward, largest gap",
        float(gap.max()),
        FP32,
    )
    again = policy.generate(given, sampling)
    yield true("sampled twice, the same tokens", torch.equal(again.tokens, rollout.tokens))


@torch.no_grad()
def _alone(model: LlamaForCausalLM, prompts: Prompts, row: int, sampling: Sampling) -> list[int]:
    """One row's response, without a cache."""
    text = prompts.tokens[row, : int(prompts.lengths[row])].tolist()
    noise, response = uniforms(sampling, prompts.sample_id[row : row + 1]), []
    for t in range(sampling.max_response):
        logits = model(torch.tensor([text + response])).logits[:, -1]
        response.append(int(pick(logits, sampling, noise[:, t], None)[0]))
        if response[-1] == 1:
            break
    return response
