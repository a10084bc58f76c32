"""Activations of a model as training batches: streamed, shuffled in a bounded buffer, and the same again on resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Site
from circuitkit.dictionaries.sites import activations_at
from circuitkit.errors import OptionError
from circuitkit.functional.norms import at_least_float32

if TYPE_CHECKING:
    from circuitkit.models.hooked import Model

Batch = tuple[Float[Tensor, "batch read d_in"], Float[Tensor, "batch out d_out"]]
POSITIONS = 4096  # run through the model at once, where tokens are given as one tensor


@dataclass(frozen=True, eq=False)
class ActivationStream:
    """Pairs of what is read and what is written, batch after batch, without end.

    Token batches fill a buffer; its positions are shuffled and served; then it is filled again. Which position comes
    when depends on ``seed`` and the shapes of the token batches alone, so batches can be skipped without a run.

    Args:
        model: whose activations they are.
        reads: sites of the inputs.
        writes: sites of the targets.
        tokens: token ids ``[n, pos]``, or batches of them that can be gone through again and again; no padding.
        batch_size: positions per batch.
        buffer: positions that are shuffled together, at least; memory is ``buffer`` times the width of all sites.
        seed: of the shuffle.
    """

    model: Model
    reads: Sequence[Site]
    writes: Sequence[Site]
    tokens: Tensor | Iterable[Tensor]
    batch_size: int
    buffer: int
    seed: int

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches from the one that training step ``step`` (from 0) uses.

        Raises:
            OptionError: if the tokens make not even one batch.
        """
        done = filled = 0
        while True:
            before = filled
            for chunk in self._chunks():
                n = sum(batch.shape[0] * batch.shape[1] for batch in chunk) // self.batch_size
                if n == 0:
                    continue  # the last few of an epoch
                filled += 1
                if done + n > step:
                    yield from self._serve(chunk, filled, max(0, step - done), n)
                done += n
            if filled == before:
                raise OptionError(
                    f"the tokens make less than one batch of {self.batch_size:,} positions; give more tokens (batches "
                    "that can be gone through again) or a smaller batch_size"
                )

    def _chunks(self) -> Iterator[list[Tensor]]:
        tokens = self.tokens
        if isinstance(tokens, Tensor):
            tokens = tokens.split(max(1, POSITIONS // max(1, tokens.shape[1])))
        chunk: list[Tensor] = []
        for batch in tokens:
            chunk.append(batch)
            if sum(b.shape[0] * b.shape[1] for b in chunk) >= self.buffer:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _serve(self, chunk: list[Tensor], index: int, first: int, n: int) -> Iterator[Batch]:
        sites = (*self.reads, *self.writes)
        # Of an SAE both ends are one site, which is recorded once.
        distinct = tuple(dict.fromkeys(sites))
        parts = [activations_at(self.model, distinct, batch) for batch in chunk]
        columns = {
            site: torch.cat([at_least_float32(part[i]).flatten(0, 1) for part in parts])
            for i, site in enumerate(distinct)
        }
        rows = len(next(iter(columns.values())))
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * index)
        order = torch.randperm(rows, generator=generator).to(next(iter(columns.values())).device)
        for i in range(first, n):
            take = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield (
                torch.stack([columns[site][take] for site in self.reads], 1),
                torch.stack([columns[site][take] for site in self.writes], 1),
            )
