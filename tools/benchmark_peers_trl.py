"""One training step of SFTTrainer, RewardTrainer or DPOTrainer, as transformers' training loop
makes it: TRL's side of tools/benchmark.py peers.

On a CPU TRL's packing and padding-free batches are off: they need FlashAttention. Gradient
checkpointing, logging and saving are off, Adam is torch's fused one (the default), attention is
torch's (the default), and the reference's log-probs are given, as TRL's own precomputation gives
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from gipo_megatron.data.tokenizer import byte_tokenizer
from tools.benchmark_peers_rows import BETA, OPTIMISATION, Cell, Row

TRAINERS: dict[str, tuple[Any, Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig, AutoModelForCausalLM),
    "rm": (RewardTrainer, RewardConfig, AutoModelForSequenceClassification),
    "dpo": (DPOTrainer, DPOConfig, AutoModelForCausalLM),
}
SETTINGS: dict[str, Any] = {
    "learning_rate": OPTIMISATION.lr,
    "lr_scheduler_type": "constant",
    "adam_beta1": OPTIMISATION.beta1,
    "adam_beta2": OPTIMISATION.beta2,
    "adam_epsilon": OPTIMISATION.eps,
    "weight_decay": OPTIMISATION.weight_decay,
    "max_grad_norm": OPTIMISATION.clip_grad,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "max_length": None,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}
# makes the trainers; the benchmark's rows are token ids already
TEXT = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}
COLUMNS = {
    "sft": ("prompt", "completion"),
    "rm": ("chosen", "rejected"),
    "dpo": ("prompt", "chosen", "rejected"),
}


class Theirs:
    """A trainer with its optimizer, ready for steps."""

    def __init__(self, cell: Cell, folder: str) -> None:
        self.task = cell.task
        trainer, config, auto = TRAINERS[cell.task]
        more: dict[str, Any] = {}
        if cell.task == "dpo":
            more = {"beta": BETA, "precompute_ref_log_probs": True}
        args = config(f"{folder}/trl", per_device_train_batch_size=cell.samples, **SETTINGS, **more)
        model = auto.from_pretrained(
            f"{folder}/{'reward' if cell.task == 'rm' else 'policy'}",
            dtype=torch.float32,
            trust_remote_code=False,
        )
        row = {name: TEXT[name] for name in COLUMNS[cell.task]}
        self.trainer = trainer(
            model,
            args=args,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=byte_tokenizer().inner,
        )
        self.trainer.create_optimizer()
        prepare = self.trainer.accelerator.prepare
        self.model, self.trainer.optimizer = prepare(self.trainer.model, self.trainer.optimizer)
        self.trainer.create_scheduler(num_training_steps=1000)
        self.size = cell.samples // 4 if cell.accumulate else cell.samples
        self.batches: list[Any] = []
        self.count: Any = None

    def collate(self, rows: Sequence[Row]) -> None:
        """Put the rows in tensors with the trainer's collator; not part of a step."""
        features = [self._features(row) for row in rows]
        parts = [features[start : start + self.size] for start in range(0, len(rows), self.size)]
        collated = map(self.trainer.data_collator, parts)
        self.trainer.current_gradient_accumulation_steps = len(parts)
        device = self.trainer.args.device
        self.batches, self.count = self.trainer.get_batch_samples(collated, len(parts), device)

    def _features(self, row: Row) -> dict[str, Any]:
        if self.task == "sft":
            labels = [-100] * len(row.prompt) + row.chosen
            return {"input_ids": row.prompt + row.chosen, "labels": labels}
        if self.task == "rm":
            return {
                "chosen_ids": row.prompt + row.chosen,
                "rejected_ids": row.prompt + row.rejected,
            }
        chosen, rejected = row.reference
        return {
            "prompt_ids": row.prompt,
            "chosen_ids": row.chosen,
            "rejected_ids": row.rejected,
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }

    def step(self) -> float:
        """Make one optimizer step on the batch and return its loss."""
        losses = [
            self.trainer.training_step(self.model, batch, self.count) for batch in self.batches
        ]
        norm = self.trainer._clip_grad_norm(self.model)
        self.trainer._get_grad_norm(self.model, grad_norm=norm)
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.model.zero_grad()
        return sum(map(float, losses))

    def close(self) -> None:
        """Keep nothing open."""
