"""Prompts and the responses to them become a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gipo_megatron.tensors import Tensor, torch
from gipo_megatron.types import Prompts, Rollout


def join(
    prompts: Prompts,
    responses: Tensor,
    counts: Tensor,
    logprobs: Tensor,
    end_ids: Sequence[int],
    pad_id: int,
    decode: Callable[[list[int]], str],
) -> Rollout:
    """Return prompts and responses, joined and right-padded to the longest row.

    responses [B, R] and logprobs [B, R] are the sampler's, of which the first counts [B] of a row
    count, one at least. A response is finished if its last token is one of `end_ids`. All tensors
    are on one device.
    """
    lengths = prompts.lengths
    total = int((lengths + counts).max()) if len(prompts) else 0
    position = torch.arange(total, device=lengths.device).expand(len(prompts), -1)
    index = position - lengths[:, None]
    mask = (index >= 0) & (index < counts[:, None])
    index = index.clamp(0, responses.shape[1] - 1)
    prompt = prompts.tokens.gather(1, position.clamp(max=prompts.tokens.shape[1] - 1))
    prompt = prompt.masked_fill(position >= lengths[:, None], pad_id)
    tokens = torch.where(mask, responses.gather(1, index), prompt)
    last = responses.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    finished = torch.isin(last, torch.tensor(end_ids, device=last.device))
    rows = zip(responses.tolist(), (counts - finished.long()).tolist(), strict=True)
    texts = [decode(row[:count]) for row, count in rows]  # without the end token
    return Rollout(
        tokens=tokens,
        mask=mask,
        prompt_lengths=lengths,
        finished=finished,
        generation_logprobs=torch.where(mask, logprobs.gather(1, index), 0.0),
        response_text=tuple(texts),
        prompt_id=prompts.prompt_id,
        sample_id=prompts.sample_id,
        source=prompts.source,
        extras=prompts.extras,
    )
