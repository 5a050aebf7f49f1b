"""What TRL's trainers make of some rows and weights: trl_worker.py FOLDER, in a process of its own
(TRL patches transformers as it loads).

FOLDER holds rows.json ({prompt, chosen, rejected} each), tokenizer/, policy/, reference/ and
reward/ (Hugging Face folders). Writes FOLDER/trl.pt: case -> {loss, gradients, tokens}, each of the
whole batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

DPO_CASES: dict[str, dict[str, Any]] = {
    "dpo/sigmoid": {"loss_type": ["sigmoid"], "beta": 0.5},
    "dpo/precomputed": {"loss_type": ["sigmoid"], "beta": 0.5, "precompute_ref_log_probs": True},
    "dpo/ipo_mean": {"loss_type": ["ipo"], "beta": 0.1},  # TRL's ipo is always of means
    "dpo/sigmoid_mean": {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    # of one pair at a time it is smoothed DPO
    "dpo/smoothed": {"loss_type": ["aot"], "beta": 0.5, "label_smoothing": 0.2},
}
COMMON = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "max_length": None,
    "save_strategy": "no",
}


def outcome(trainer: Any) -> dict[str, Any]:
    """Loss and gradients of the mean over the trainer's batches, in the dataset's order."""
    trainer.model.train()
    batches = list(trainer.get_eval_dataloader())
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch)) / len(batches)
        loss.backward()
        total += float(loss.detach())
    gradients = {
        name.removeprefix("module."): p.grad.clone()
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }
    tokens: list[Tensor] = [
        row[kept.bool()]
        for b in batches
        for row, kept in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    return {"loss": total, "gradients": gradients, "tokens": [row.tolist() for row in tokens]}


def causal(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def main() -> None:
    folder = Path(sys.argv[1])
    rows = json.loads((folder / "rows.json").read_text())
    pairs = datasets.Dataset.from_list(rows)
    examples = datasets.Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found: dict[str, Any] = {}

    def setting(config: type, size: int = len(rows), **more: Any) -> Any:
        return config(
            str(folder / "out"),
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            **COMMON,
            **more,
        )

    for name, keys in DPO_CASES.items():
        args = setting(DPOConfig, 1 if name == "dpo/smoothed" else len(rows), **keys)
        policy, reference = causal(folder / "policy"), causal(folder / "reference")
        found[name] = outcome(
            DPOTrainer(
                policy,
                reference,
                args=args,
                train_dataset=pairs,
                eval_dataset=pairs,
                processing_class=tokenizer,
            )
        )
    sft = setting(SFTConfig)
    found["sft"] = outcome(
        SFTTrainer(
            causal(folder / "policy"),
            args=sft,
            train_dataset=examples,
            eval_dataset=examples,
            processing_class=tokenizer,
        )
    )
    for name, centre in (("rm", None), ("rm/centred", 0.1)):
        reward = AutoModelForSequenceClassification.from_pretrained(
            folder / "reward", num_labels=1, dtype=torch.float32, attn_implementation="eager"
        )
        reward.config.pad_token_id = tokenizer.pad_token_id
        args = setting(RewardConfig, center_rewards_coefficient=centre)
        found[name] = outcome(
            RewardTrainer(
                reward,
                args=args,
                train_dataset=pairs,
                eval_dataset=pairs,
                processing_class=tokenizer,
            )
        )
    found |= online(folder, tokenizer)
    torch.save(found, folder / "trl.pt")


def online(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """One step of TRL's trainers that sample: rewards and advantages of four responses to each of
    three prompts."""
    prompts = datasets.Dataset.from_list([{"prompt": f"Prompt {i}"} for i in range(3)])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [sum(map(ord, text)) % 101 / 101 for text in completions]

    found: dict[str, Any] = {}
    for name, trainer, config in (
        ("rloo", RLOOTrainer, RLOOConfig),
        ("grpo", GRPOTrainer, GRPOConfig),
    ):
        args = config(
            str(folder / "out"),
            per_device_train_batch_size=12,
            num_generations=4,
            max_completion_length=6,
            max_steps=1,
            beta=0.0,
            seed=0,
            **{key: value for key, value in COMMON.items() if key != "max_length"},
        )
        made = trainer(
            causal(folder / "policy"),
            reward,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
        )
        made.train()
        found[name] = {
            "prompts": list(made._logs["prompt"]),
            "rewards": list(made._logs["rewards"]["reward"]),
            "advantages": list(made._logs["advantages"]),
        }
    return found


if __name__ == "__main__":
    main()
