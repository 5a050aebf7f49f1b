"""Checks of a sampler on a server (`serve` is among its keys), in a recipe of training or of an
evaluation."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from gipo_megatron.recipe.draft import Draft, Found
from gipo_megatron.specs import divisors


def _sampler(d: Draft) -> tuple[str, dict[str, Any]]:
    """Return the key of the sampler's block, and its values; none where it has no server."""
    training = "algorithm" in d.sections
    key = "algorithm.rollout" if training else "rollout"
    values = d.algorithm.get("rollout", {}) if training else d.rollout
    return key, values if "serve" in values else {}


def server(d: Draft) -> Found:
    """A server that the run starts fits into a machine, its tensor ranks divide the model, and the
    transfer of weights works there."""
    block, sampler = _sampler(d)
    if not sampler or sampler["url"]:
        return
    serve, key = sampler["serve"], f"{block}.serve.tensor_parallel"
    tensor, a = serve.tensor_parallel, d.model.architecture
    gpus = len(serve.gpus) if serve.devices else d.hardware.per_node
    if (serve.devices or d.hardware.gpus) and tensor > gpus:
        where = "serve.devices lists" if serve.devices else "a machine has"
        yield d.problem(key, f"{tensor}, and {where} {gpus}", f"{key}={gpus}")
    uneven = max(tensor, a.num_kv_heads) % min(tensor, a.num_kv_heads)
    if a.num_heads % tensor or a.ffn_hidden_size % tensor or uneven:
        sizes = f"num_heads {a.num_heads}, num_kv_heads {a.num_kv_heads}"
        what = f"{tensor} does not divide {sizes}, ffn_hidden_size {a.ffn_hidden_size}"
        yield d.problem(key, what, divisors(a.num_heads))
    if sampler["transfer"] == "broadcast" and d.hardware.gpus and "0" in serve.gpus:
        what = "broadcast goes over NCCL, which has no two ranks on one GPU: the server and rank 0"
        fix = f"{block}.transfer=file, or other GPUs for the server ({block}.serve.devices)"
        yield d.problem(f"{block}.transfer", what, fix)


def served(d: Draft) -> Found:
    """A server computes with other kernels than the trainer, and a file stays on its machine."""
    block, sampler = _sampler(d)
    if not sampler:
        return
    trains = "algorithm" in d.sections
    if trains and d.precision.dtype == "bf16" and sampler["correction"] == "none":
        what = "none: a server's bf16 log-probs differ from the trainer's, and nothing corrects it"
        yield d.problem(f"{block}.correction", what, f"{block}.correction=truncated")
    if d.precision.deterministic:
        what = "a server's responses depend on how it batches them: they may differ between runs"
        yield d.problem("precision.deterministic", what, f"{block}.name=sampling")
    host = urlsplit(sampler["url"]).hostname or "localhost"
    if sampler["transfer"] == "file" and not _is_here(host):
        what = f"file needs the server on rank 0's machine, and {block}.url names {host}"
        yield d.problem(f"{block}.transfer", what, f"{block}.transfer=broadcast")


def _is_here(host: str) -> bool:
    """Check for an address that every machine has for itself."""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified
