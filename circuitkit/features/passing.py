"""One pass through a local replacement model: what changes come to a site, and what is passed on from there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.features.local import LocalModel, Reads, Stage, Writes, owner

Rows = Float[Tensor, "row pos _"]


class Changes(Protocol):
    """What is changed in each of several runs."""

    @property
    def rows(self) -> int:
        """How many runs."""

    @property
    def factors(self) -> Float[Tensor, "row source"] | None:
        """Of each source that is no latent: what it is multiplied by, less 1; None for no change."""

    def latents(self, site: Site, f: Rows) -> Rows:
        """The latents of the dictionary that reads a site, from those that were computed."""

    def tensor(self, site: Site, y: Rows) -> Rows:
        """The tensor at a site, as it is passed on."""

    def tensors(self) -> Collection[Site]:
        """The sites where ``tensor`` does anything."""


@dataclass(frozen=True, eq=False)
class Passed:
    """What passed in some runs.

    Args:
        changes: of the tensor at each site that was looked at, from the clean run, as it is read.
        latents: of each dictionary, by the site it reads.
        stream: after the last block.
        constants: how much the constants of each component changed, as a share of them.
    """

    changes: Mapping[Site, Rows]
    latents: Mapping[Site, Rows]
    stream: Float[Tensor, "row pos d"]
    constants: Mapping[Site, Float[Tensor, " row"]]

    def moved(self, reads: Reads) -> Float[Tensor, "row target"]:
        """How far targets moved, linear in what they read; a latent's pre-activation, for one."""
        change = self.changes[reads.site][:, reads.positions]
        found = torch.einsum("rtd,td->rt", change, reads.vectors)
        share = self.constants.get(owner(reads.site))
        return found if share is None else found + share[:, None] * reads.constants


@dataclass(eq=False)
class Clean:
    """The run without changes: tensors and latents by site."""

    values: dict[Site, Tensor] = field(default_factory=dict)
    latents: dict[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Parts:
    """What stays the same in all passes.

    Args:
        local: the local replacement model.
        coders: of each dictionary, by the site it reads.
        writers: of each site, which dictionaries write it and with which of their decoders.
    """

    local: LocalModel
    coders: Mapping[Site, SparseCoder]
    writers: Mapping[Site, Sequence[tuple[Site, int]]]

    @cached_property
    def stages(self) -> dict[Site, Stage]:
        """All stages by site."""
        return {stage.site: stage for stage in self.local.stages()}


class Passing:
    """One pass: what dictionaries read and made, and what they therefore write."""

    def __init__(self, parts: Parts, changes: Changes, clean: Clean, held: set[int], watched: Collection[Site]) -> None:
        self.parts, self.changes, self.clean = parts, changes, clean
        self.held, self.watched = held, watched
        self.seen: dict[Site, Rows] = {}
        self.made: dict[Site, Rows] = {}

    def passed(self, stream: Rows) -> Passed:
        """What is kept of the pass."""
        factors, shares = self.changes.factors, dict[Site, Tensor]()
        if factors is not None:
            columns = self.parts.local.bias_columns
            shares = {site: factors[:, column] for site, column in columns.items() if bool(factors[:, column].any())}
        return Passed({site: self.seen[site] for site in self.watched}, self.made, stream, shares)

    def at(self, site: Site, change: Rows) -> Rows:
        """The change that a tensor passes on, from the one that comes to it."""
        stage, parts = self.parts.stages[site], self.parts
        writers = parts.writers.get(site)
        if writers is None or stage.cut:
            change = change + self._factored(stage, stage.inner, change)
        if site in self.watched or site in parts.coders:
            self.seen[site] = change
        if site in parts.coders:
            self.made[site] = self._latents(site, change)
        if writers is not None:
            change = self._written(site, writers, change)
            change = change + self._factored(stage, stage.outer if stage.cut else stage.inner, change)
        if site in self.changes.tensors():
            value = self.clean.values[site]
            change = self.changes.tensor(site, value + change) - value
        return change

    def _latents(self, site: Site, change: Rows) -> Rows:
        clean = self.clean.latents[site]
        if site.layer in self.held:
            f = clean.expand(len(change), *clean.shape)
        else:
            f = self.parts.coders[site].encode(self.clean.values[site] + change)
        return self.changes.latents(site, f)

    def _written(self, site: Site, writers: Sequence[tuple[Site, int]], like: Rows) -> Rows:
        found = torch.zeros_like(like)
        for read, number in writers:
            coder = self.parts.coders[read]
            found = found + (self.made[read] - self.clean.latents[read]) @ coder.W_dec[number]
            if coder.W_skip is not None:
                found = found + self.seen[read] @ coder.W_skip
        return found

    def _factored(self, stage: Stage, writes: tuple[Writes, ...], change: Rows) -> Rows:
        """What sources other than latents write beyond what they wrote in the clean run."""
        out = torch.zeros_like(change)
        if self.changes.factors is None:
            return out
        whole = stage.site.kind == "mlp-out" and stage.site not in self.parts.writers
        for w in writes:
            factors = self.changes.factors[:, columns_of(w)]
            if not bool(factors.any()):
                continue
            vectors = w.vectors
            if whole and not w.shared:  # an MLP without a dictionary: its error is all that it writes, as it is now
                out = out + factors[..., None] * (self.clean.values[stage.site] + change)
                continue
            out = out.index_add(1, w.positions, (factors[..., None] * vectors).to(out))
        return out


def columns_of(w: Writes) -> slice:
    """The sources that writes belong to."""
    return slice(w.first, w.first + (1 if w.shared else len(w.positions)))
