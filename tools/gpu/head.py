"""Part `head`: log-probs with gradients from hidden states, against cross_entropy of whole logits.

Half of the positions are masked. Of H · V · positions, the whole logits cost 2 forward and 4
backward; the blocks 2 and 6 for half of the positions, so 1.5 times less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gipo_megatron.megatron.outputs import response_positions, token_stats
from gipo_megatron.types import Sequences
from tools.gpu.bench import Bench, Figure, below, figure

VOCABULARIES = (32000, 128256)
FASTER = 1.2  # than whole logits
SMALLER = 0.5  # peak memory, beside that of the inputs
CLOSE = 1e-2  # relative: both logits are rounded to bf16


@dataclass
class Case:
    bench: Bench
    vocabulary: int
    rows: int
    length: int
    hidden_size: int

    def __post_init__(self) -> None:
        device = self.bench.device
        g = torch.Generator(device).manual_seed(0)
        shape = (self.rows, self.length, self.hidden_size)
        self.hidden = torch.randn(shape, generator=g, device=device).bfloat16().requires_grad_()
        weight = torch.randn(self.vocabulary, self.hidden_size, generator=g, device=device)
        self.weight = (weight * self.hidden_size**-0.5).bfloat16().requires_grad_()
        tokens = torch.randint(self.vocabulary, shape[:2], generator=g, device=device)
        mask = (torch.arange(self.length) >= self.length // 2).expand(self.rows, -1)
        half = torch.full((self.rows,), self.length // 2, device=device)
        self.positions = response_positions(mask).to(device)
        ids = torch.arange(self.rows, device=device)
        self.sequences = Sequences(tokens, mask.to(device), half, 2 * half, ids)

    def ours(self) -> Tensor:
        return token_stats(
            self.hidden,
            self.weight,
            self.sequences,
            self.positions,
            vocab_size=self.vocabulary,
            mesh=self.bench.mesh,
        ).logprobs

    def whole(self) -> Tensor:
        """As Megatron-LM and Transformers do it: logits of all positions, then in fp32."""
        logits = F.linear(self.hidden, self.weight)[:, :-1].float()
        nll = F.cross_entropy(
            logits.flatten(0, 1), self.sequences.tokens[:, 1:].flatten(), reduction="none"
        )
        return F.pad(-nll.view(self.rows, -1), (1, 0)) * self.sequences.mask

    def step(self, side: Callable[[], Tensor]) -> None:
        self.hidden.grad = self.weight.grad = None
        side().sum().backward()

    def gradients(self, side: Callable[[], Tensor]) -> list[Tensor]:
        self.step(side)
        assert self.hidden.grad is not None and self.weight.grad is not None
        return [self.hidden.grad, self.weight.grad]


def head(bench: Bench) -> Iterator[Figure]:
    for vocabulary in VOCABULARIES:
        sizes = (2, 32, 64) if bench.tiny else (8, 1024, 4096)
        case = Case(bench, vocabulary // 100 if bench.tiny else vocabulary, *sizes)
        yield from compared(case, f"V {vocabulary}")
        yield from measured(bench, case, f"V {vocabulary}")
        del case
        bench.empty()


def compared(case: Case, name: str) -> Iterator[Figure]:
    with torch.no_grad():
        yield below(f"{name}: log-probs", distance(case.ours(), case.whole()), CLOSE)
    pairs = zip(case.gradients(case.ours), case.gradients(case.whole), strict=True)
    yield below(f"{name}: gradients", max(distance(a, b) for a, b in pairs), CLOSE)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def measured(bench: Bench, case: Case, name: str) -> Iterator[Figure]:
    seconds, peaks = [], []
    for label, side in (("whole logits", case.whole), ("ours", case.ours)):
        seconds.append(bench.seconds(lambda side=side: case.step(side)))
        yield figure(f"{name}, {label}: ms", 1000 * seconds[-1])
        case.hidden.grad = case.weight.grad = None
        bench.empty()
        with bench.peak() as peak:
            before = peak()
            case.step(side)
            bench.sync()
            peaks.append(peak() - before)
        yield figure(f"{name}, {label}: peak GiB beside the inputs", peaks[-1])
    yield bench.fast(f"{name}: times faster", seconds[0] / seconds[1], FASTER)
    if bench.cuda and not bench.tiny:
        yield below(f"{name}: share of the memory", peaks[1] / peaks[0], SMALLER)
