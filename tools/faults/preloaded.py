"""Modules that the fork server of tools/faults/world.py imports once: ours, and the packages that
functions of ours import when they need them."""

from __future__ import annotations

import gc

import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import pyarrow.parquet  # noqa: F401
import safetensors.torch  # noqa: F401
import sklearn.linear_model
import sklearn.metrics  # noqa: F401
import torch
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import gipo_megatron.commands.convert
import gipo_megatron.conversion.convert
import gipo_megatron.evaluation.run
import gipo_megatron.planning.planner
import gipo_megatron.reports.run_report
import gipo_megatron.training.runner  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # a full collection, which Megatron-Core does at every save, then passes over them
