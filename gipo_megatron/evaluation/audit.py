"""Audit of a group classifier on the responses of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from gipo_megatron.errors import UserError
from gipo_megatron.evaluation.types import Response, TaskPrompt
from gipo_megatron.reports.audit import Audit, Row, audit_rows, finite_or_none


def audit_responses(prompts: Sequence[TaskPrompt], responses: Sequence[Response]) -> Audit:
    """Audit the responses of one policy that have figures.p_high.

    Raises UserError where none has a p_high, or a response's prompt is not among `prompts`.
    """
    by_key = {(p.task, p.prompt_id): p for p in prompts}
    rows = []
    for r in responses:
        p_high = finite_or_none(r.figures.get("p_high"))
        if p_high is None:
            continue
        if (r.task, r.prompt_id) not in by_key:
            raise UserError(
                f"no prompt {r.prompt_id!r} in task {r.task!r}",
                fix="prompts and responses are of two evaluations",
            )
        prompt = by_key[r.task, r.prompt_id]
        score, kl = (finite_or_none(r.figures.get(name)) for name in ("score", "kl"))
        rows.append(Row(prompt.text, r.text, prompt.source, p_high, float(r.tokens), score, kl))
    if not rows:
        raise UserError(
            "no response with p_high",
            fix="evaluate with models.critic, the critic of a run with a group_classifier",
        )
    return audit_rows(" + ".join(dict.fromkeys(r.policy for r in responses)), rows)
