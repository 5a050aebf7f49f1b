"""Modules that the server of tests/forked.py imports once."""

from __future__ import annotations

import gc

import torch

import gipo_megatron.evaluation.run
import gipo_megatron.planning.planner
import gipo_megatron.training.runner  # noqa: F401
import tests.parity.worker  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # a full collection, which Megatron-Core does at every save, then passes over them
