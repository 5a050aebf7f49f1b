"""The model card of an exported folder: kind, recipe, step and commit, use, and the checks that
passed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from gipo_megatron.screen import code, markdown
from gipo_megatron.specs import AdapterSpec
from gipo_megatron.weights.checkpoints import CheckpointMeta, RoleMeta

KINDS = {None: "language model", "score": "reward model", "value": "critic"}


def model_card(
    role: str,
    about: RoleMeta,
    meta: CheckpointMeta,
    *,
    base: str,
    padding: str | None,
    checks: Sequence[str],
) -> str:
    """Return README.md. base: the model of adapters, empty for a whole one; padding: the token that
    texts for a model with a head are padded with; checks: one line each."""
    head, hub, a = about.head, meta.hub, about.architecture
    if meta.recipe:
        origin = (
            f"trained with gipo_megatron: recipe {code(meta.recipe)}, step {meta.step}, commit"
            f" {code(meta.commit)}"
        )
    else:
        origin = f"converted with gipo_megatron, commit {code(meta.commit)}, not trained by it"
    parts = [
        _front_matter(head, base or hub, "peft" if base else "transformers"),
        f"# {markdown(meta.recipe or hub or 'A converted model')}: {markdown(role)}",
        f"A {KINDS[head]}, {origin}.",
        _adapters(about.adapter, base),
        f"{a.num_layers} layers, hidden size {a.hidden_size}, vocabulary {a.vocab_size},"
        f" {about.dtype}" + (f"; base model {markdown(hub)}." if hub else "."),
        _usage(head, base, padding),
        _head(head, padding),
        _groups(about),
        _prompts(meta),
        "## Checked at export\n\n" + "\n".join(f"- {line}" for line in checks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _adapters(spec: AdapterSpec | None, base: str) -> str:
    if spec is None:
        return ""
    what = f"LoRA of rank {spec.rank}, alpha {spec.alpha:g} ({spec.scaling} scaling), on"
    what += f" {', '.join(spec.targets)}"
    if not base:
        return f"Trained as {what}; merged into the weights here."
    return f"These are the adapters alone, in PEFT's format: {what} of {code(base)}."


def _front_matter(head: str | None, hub: str, library: str) -> str:
    task = "text-generation" if head is None else "text-classification"
    base = f"base_model: {hub}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", hub) else ""
    return f"""---
library_name: {library}
pipeline_tag: {task}
{base}tags:
- gipo-megatron
- rlhf
---"""


def _usage(head: str | None, base: str, padding: str | None) -> str:
    name = "AutoModelForCausalLM" if head is None else "AutoModelForSequenceClassification"
    imports, first, then = "", '"PATH"', ""
    if base:  # a string of Python without an end of this block
        imports, first = "from peft import PeftModel\n", json.dumps(base).replace("`", "\\u0060")
        then = 'model = PeftModel.from_pretrained(model, "PATH")\n'
    labels = ", num_labels=1" if base and head is not None else ""
    # the base's config.json is a language model's
    last = "model.config.pad_token_id = tokenizer.pad_token_id\n" if base and padding else ""
    return f"""```python
{imports}from transformers import {name}, AutoTokenizer
model = {name}.from_pretrained({first}, dtype="auto"{labels})
{then}tokenizer = AutoTokenizer.from_pretrained("PATH")
{last}```"""


def _head(head: str | None, padding: str | None) -> str:
    if head is None:
        return ""
    what = (
        "The score of the whole text"
        if head == "score"
        else "The value of the state after the whole text"
    )
    text = f"{what} is the one logit, read at the last token that is not padding."
    text += (
        " It was trained on texts that end with the tokenizer's end-of-text token: remove what a"
        " chat template writes after it."
    )
    if padding is None:
        return (
            f"{text} No token of this tokenizer is safe to pad with (it must never occur in a"
            " text): score one text at a time."
        )
    return f"{text} Pad on the right, with {code(padding)} (the tokenizer does)."


def _groups(about: RoleMeta) -> str:
    if about.num_groups is None:
        return ""
    token = "the last prompt token" if about.group_input == "prompt" else "the last token"
    return (
        "`group_head.safetensors` holds the group classifier that was learned with it: weight"
        f" [{about.num_groups}, hidden], bias [{about.num_groups}], fp32. softmax(W h + b) of"
        f" the trunk's last hidden state h at {token} gives the probabilities of the"
        f" {about.num_groups} groups. transformers ignores the file; gipo_megatron reads it."
    )


def _prompts(meta: CheckpointMeta) -> str:
    if meta.template is None:
        return ""
    return (
        f"Trained with {code(f'data.template: {meta.template}')}; the tokenizer's chat template,"
        " where it has one, writes conversations so."
    )
