"""One model, spread over this world: forward passes, and exactly one optimizer step per update.

parts ──counts over DP──▶ micro-batches ──1F1B / interleaved──▶ gradients ──finite everywhere?──▶
clip, step
                               │ last stage: readout → loss → Σ terms / global count of their unit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gipo_megatron.megatron import cpu_compat, schedules
from gipo_megatron.megatron.base import Base
from gipo_megatron.megatron.heads import GroupHead
from gipo_megatron.megatron.hf import export_weights
from gipo_megatron.megatron.hf_adapters import export_adapters
from gipo_megatron.megatron.mesh import Mesh
from gipo_megatron.megatron.microbatches import (
    MicroBatch,
    Readout,
    gather,
    plan,
    rebuild,
    tensors,
    widen,
)
from gipo_megatron.megatron.model import build_chunks
from gipo_megatron.megatron.offload import Residency, Shelf, Snapshot, host_copies, swapped
from gipo_megatron.megatron.optimizer import (
    LearningRate,
    build_optimizer,
    clipped_step,
    gradient_norm,
    mark_shards,
    whole_gradients,
    wrap,
)
from gipo_megatron.megatron.precision import length_multiple
from gipo_megatron.megatron.scaling import Scaling
from gipo_megatron.metrics import Metric, Metrics, merge_metrics
from gipo_megatron.specs import AdapterSpec, Architecture, HeadSpec, Optimisation, Precision
from gipo_megatron.types import BatchLoss, CriticOutput, Output, Rows, TokenStats, Update

Part = tuple[Rows, BatchLoss]
# (forward | update, tokens of a pass that are not padding, all its tokens) -> nothing
Count = Callable[[str, int, int], None]


class Engine:
    """A model and, with an `optimisation`, all it takes to train it.

    head: None for a language model, "value" or "score"; group: a group head beside the value head;
    adapter: of rank 0, none; base: frozen weights that it shares; micro_batch or micro_tokens: rows
    or tokens of a micro-batch; offload: none | cpu. Every method is collective: all ranks call it,
    the ranks of a replica with the same rows.
    """

    def __init__(
        self,
        mesh: Mesh,
        architecture: Architecture,
        precision: Precision,
        *,
        micro_batch: int | None,
        micro_tokens: int | None = None,
        seed: int,
        head: str | None = None,
        group: HeadSpec | None = None,
        adapter: AdapterSpec = AdapterSpec(),
        base: Base | None = None,
        optimisation: Optimisation | None = None,
        recompute: str = "none",
        offload: str = "none",
        initialise: bool = True,
        count: Count = lambda *numbers: None,
    ) -> None:
        Residency.make_room()
        self.mesh, self.architecture, self.precision = mesh, architecture, precision
        self.head, self.group, self.adapter, self.base = head, group, adapter, base
        self.optimisation, self.count = optimisation, count
        self.micro_batch, self.micro_tokens = micro_batch, micro_tokens  # one of them
        # config.json and the like of the Hugging Face model it came from, word for word
        self.hf_files: dict[str, str] = {}
        self.version = 0  # changes of the weights, equal on all ranks
        self.chunks: list[GPTModel] = build_chunks(
            architecture,
            mesh,
            precision,
            recompute=recompute,
            head=head,
            adapter=adapter,
            base=base,
            seed=seed,
            initialise=initialise,
        )
        self.group_head = (
            GroupHead(group, architecture.hidden_size, mesh, seed) if group is not None else None
        )
        self._wrapped: list[Any] = list(self.chunks)
        if optimisation is not None:
            mark_shards(self.chunks, architecture.vocab_size)
            self._wrapped = wrap(self.chunks)
            self.optimizer = build_optimizer(self._wrapped, optimisation, precision)
            self.learning_rate = LearningRate(optimisation)
            config = self.chunks[0].config
            config.finalize_model_grads_func = finalize_model_grads
            no_sync = [wrapped.no_sync for wrapped in self._wrapped]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.scaling = Scaling(self.chunks, precision)
        shelves = (
            (Shelf(self._gradients, keep=False), Shelf(self.optimizer_tensors))
            if optimisation is not None
            else ()
        )
        self.residency = Residency(offload, Shelf(self._weights), shelves)

    # -------------------------------------------------------------------------------------- forward

    def forward(self, batch: Rows, readout: Readout) -> Output:
        """Return the output of `readout` for every sequence of `batch`, in their order, on every
        rank of the replica. No gradient."""
        slots = self._plan(batch)
        self._count("forward", slots)
        with self.ready(), self.scaling.inference():
            outputs = schedules.run(
                self._wrapped, slots, partial(_answer, readout), forward_only=True
            )
            whole = gather(slots, outputs) if outputs else None
            return self._from_last_stage(whole)

    def _from_last_stage(self, output: Output | None) -> Output:
        if self.mesh.pipeline_size == 1:
            assert output is not None
            return output
        message: list[Any] = [None]
        if output is not None:
            kind = next(k for k in (TokenStats, CriticOutput, Tensor) if isinstance(output, k))
            message = [(kind, [None if t is None else (t.shape, t.dtype) for t in tensors(output)])]
        kind, layout = self._share(message)
        parts = (
            tensors(output)
            if output is not None
            else [
                None if x is None else torch.empty(x[0], dtype=x[1], device=self.mesh.device)
                for x in layout
            ]
        )
        return rebuild(
            kind,
            [
                None if t is None else self.mesh.broadcast_from_last_stage(t.contiguous())
                for t in parts
            ],
        )

    def _share(self, message: list[Any]) -> Any:
        """Return the last stage's object on every stage of its pipeline."""
        if self.mesh.pipeline_size > 1:
            dist.broadcast_object_list(
                message, src=self.mesh.last_stage_rank, group=self.mesh.pipeline_group
            )
        return message[0]

    # --------------------------------------------------------------------------------------- update

    def update(self, parts: Sequence[Part], readout: Readout) -> Update:
        """Make one optimizer step on Σ_terms sum / N_unit, N the unit's count in that part's whole
        (data parallel) batch.

        After a non-finite loss or gradient on any rank no rank makes a step, and `skipped` lists
        the rows.
        """
        assert self.optimisation is not None, "this model was built without an optimiser"
        with self.residency.use(training=True):
            metrics, bad = self.backward(parts, readout)
            norm = gradient_norm(self.optimizer)
            head_norm = self.group_head.reduce_gradients() if self.group_head is not None else 0.0
            skipped = self._skipped(parts, bad, isfinite(norm) and isfinite(head_norm))
            if skipped is not None:
                return Update({}, skipped)
            lr = self.learning_rate.value
            clipped_step(self.optimizer, norm, self.optimisation, lr)
            if self.group_head is not None:
                self.group_head.step(head_norm)
            self.learning_rate.steps += 1
            self.version += 1
            return Update({**metrics, "grad_norm": _exact(norm), "learning_rate": _exact(lr)})

    def backward(self, parts: Sequence[Part], readout: Readout) -> tuple[Metrics, list[int]]:
        """Compute the gradients of the update's loss, reduced but not clipped; return the loss's
        metrics and the row ids of non-finite losses."""
        slots = self._slots(parts)
        self._count("update", slots)
        for wrapped in self._wrapped:
            wrapped.zero_grad_buffer()
        if self.group_head is not None:
            self.group_head.zero_grad()
        self._mode(train=True)
        with self.scaling.training():
            results = schedules.run(
                self._wrapped, slots, partial(self._loss, readout), forward_only=False
            )
        totals: list[Tensor] = []
        metrics: Metrics = {}
        for total, slot, new in results:
            totals.append(total)
            metrics = metrics if slot.idle else merge_metrics(metrics, new)
        sums, metrics = _to_host(totals, metrics)
        slots = [
            slot
            for (_, slot, _), x in zip(results, sums, strict=True)
            if not slot.idle and not isfinite(x)
        ]
        return self._share([(metrics, [i for slot in slots for i in slot.rows.row_ids.tolist()])])

    def _slots(self, parts: Sequence[Part]) -> list[MicroBatch]:
        """Return the micro-batches of all parts, as many on every replica: FP8's delayed scaling
        reduces over the replicas in each of them."""
        slots = []
        data = self.mesh.data_parallel
        for rows, loss in parts:
            planned, local = self._plan(rows), rows.counts()
            numbers = torch.zeros(data.size + len(local), dtype=torch.float64)
            numbers[data.rank] = len(planned)
            numbers[data.size :] = torch.tensor(list(local.values()))
            found = data.sum(numbers).tolist()
            counts = dict(zip(local, found[data.size :], strict=True))
            if (most := int(max(found[: data.size]))) > len(planned):
                planned = self._plan(rows, most)
            slots += [replace(slot, loss=loss, counts=counts) for slot in planned]
        return slots

    @staticmethod
    def _loss(readout: Readout, slot: MicroBatch, raw: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Return mcore's triple. The integer count 0 keeps mcore from dividing: each term has its
        own count."""
        assert slot.loss is not None and slot.counts is not None
        answer = _answer(readout, slot, raw)
        loss = slot.loss(answer, slot.rows)
        total = torch.zeros((), device=raw.device)
        for value, unit in loss.terms.values():
            total = total + value.float() / max(slot.counts[unit], 1.0)
        if slot.idle or not total.requires_grad:
            # from the answer, so that the head's weight, too, gets a gradient of zero
            first = tensors(answer)[0]
            assert first is not None
            total = first.flatten()[0].float() * 0.0
        return (
            total,
            torch.zeros((), dtype=torch.int, device=raw.device),
            (total.detach().clone(), slot, loss.metrics),
        )

    def _skipped(
        self, parts: Sequence[Part], bad: list[int], finite: bool
    ) -> tuple[int, ...] | None:
        """Return the row ids to list, equal on every rank; None when all numbers are finite."""
        flag = torch.tensor([float(bool(bad) or not finite)], device=self.mesh.device)
        if self.mesh.world > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag.item():
            return None
        mine = (bad, [i for rows, _ in parts for i in rows.row_ids.tolist()])
        everyone = self.mesh.everyone(mine)
        named = {i for rows, _ in everyone for i in rows} or {
            i for _, rows in everyone for i in rows
        }
        return tuple(sorted(named))

    # --------------------------------------------------------------------------------- the pipeline

    def _plan(self, rows: Rows, least_slots: int = 1) -> list[MicroBatch]:
        mesh = self.mesh
        return plan(
            rows,
            self.micro_batch,
            mesh.device,
            micro_tokens=self.micro_tokens,
            length_multiple=length_multiple(self.precision, mesh.parallel),
            slot_multiple=mesh.pipeline_size if mesh.parallel.virtual_pipeline > 1 else 1,
            least_slots=least_slots,
        )

    def _count(self, kind: str, slots: list[MicroBatch]) -> None:
        whole = sum(slot.sequences.tokens.numel() for slot in slots)
        self.count(kind, sum(slot.real for slot in slots), whole)

    def _mode(self, *, train: bool) -> None:
        for chunk in self.chunks:
            # walking over all modules costs as much as a few layers of a tiny model
            if chunk.training != train:
                chunk.train(train)

    # ------------------------------------------------------------------- weights and where they are

    def _weights(self) -> list[Tensor]:
        """Return the tensors of this rank's weights, but frozen ones: flat buffers once wrapped,
        else the parameters."""
        if self.optimisation is not None:
            return [b.param_data for w in self._wrapped for b in w.buffers]
        return [p.data for chunk in self.chunks for p in chunk.parameters() if p.requires_grad]

    def _gradients(self) -> list[Tensor]:
        return [b.grad_data for w in self._wrapped for b in w.buffers]

    def optimizer_tensors(self) -> list[Tensor]:
        """Return this rank's masters and moments."""
        masters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [
            state
            for optimizer in self.optimizer.chained_optimizers
            for state in optimizer.optimizer.state.values()
        ]
        moments = [x for state in states for x in state.values()]
        return [t.data for t in (*masters, *moments) if isinstance(t, Tensor)]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Keep the weights on the device and the model in inference mode, for generation."""
        with self.residency.use(), torch.no_grad():
            self._mode(train=False)
            yield

    def snapshot(self) -> Snapshot:
        """Return this rank's weights, on the host, and FP8 scaling state, for `swapped`."""
        with self.residency.use():
            return Snapshot(host_copies(self._weights()), self.scaling.read())

    @contextmanager
    def swapped(self, other: Snapshot) -> Iterator[None]:
        """Put another model (a `snapshot` of the same layout) in this one's place; this one comes
        back at the end, bit for bit."""
        with (
            self.residency.use(),
            swapped(self._weights(), other.weights),
            self.scaling.swapped(other.scaling),
        ):
            yield

    def weights_changed(self) -> None:
        """Copy loaded weights to the optimizer's fp32 masters; else the next step would bring the
        old ones back."""
        self.version += 1
        if self.optimisation is not None:
            with cpu_compat.host_mode():
                self.optimizer.reload_model_params()

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor), on every rank."""
        with self.residency.use():
            yield from export_weights(self.chunks, self.mesh, self.architecture, head=self.head)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, or PEFT's for adapters, whole gradient) after `backward`, in
        the weights' dtype, the group head's left out."""
        gathered = whole_gradients(self._wrapped, self.mesh.data_parallel)
        place = self.chunks, self.mesh, self.architecture
        with swapped(self._weights(), gathered):
            if self.adapter.rank:
                yield from export_adapters(*place, self.adapter, head=self.head)
            else:
                yield from export_weights(*place, head=self.head)


def _answer(readout: Readout, slot: MicroBatch, raw: Tensor) -> Output:
    return widen(readout(raw, slot), slot.width)


def _to_host(totals: list[Tensor], metrics: Metrics) -> tuple[list[float], Metrics]:
    """Return the slots' totals and the merged metrics, in one copy from the device: each single
    copy would wait for it."""
    if not totals:
        return [], metrics
    device = totals[0].device
    parts = [torch.stack(totals).double(), *(m.parts.to(device) for m in metrics.values())]
    sums, *own = torch.cat(parts).cpu().split([len(part) for part in parts])
    return sums.tolist(), {
        name: Metric(m.kind, x) for (name, m), x in zip(metrics.items(), own, strict=True)
    }


def _exact(value: float) -> Metric:
    return Metric.mean(torch.tensor(value, dtype=torch.float64))
