"""Passes over the activations of some latents, batch by batch: maxima, top examples, histograms, draws.

All of a batch's latents are treated at once; of equal activations the earlier text comes first, however texts are cut
into batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.sites import activations
from circuitkit.models.hooked import Model

PER_INTERVAL = 5  # examples of each part of the range
POSITIONS = 4096  # run through the model at once, at most
BUDGET = 2**28  # bytes of latents at a time, where none are given


@dataclass(frozen=True, eq=False)
class Source:
    """Activations of the chosen latents, batch after batch."""

    model: Model
    dictionary: Dictionary
    tokens: Tensor
    latents: Int[Tensor, " latent"]
    budget: int | str | None

    def batches(self) -> Iterator[tuple[int, Float[Tensor, "batch pos latent"]]]:
        """Number of the first row, and activations."""
        from circuitkit.methods.plan import parse_bytes

        coder = self.dictionary.coder
        wide = 12 * coder.n_latents * self.tokens.shape[1]  # pre-activations, latents and those that are chosen
        size = min((parse_bytes(self.budget) or BUDGET) // wide, POSITIONS // self.tokens.shape[1])
        size = max(1, size)
        for first in range(0, len(self.tokens), size):
            x = activations(self.model, self.dictionary.read, self.tokens[first : first + size])
            found = coder.encode(x.to(coder.W_enc))
            yield first, found[..., self.latents.to(found.device)].cpu()


class Kept:
    """For each latent the texts of the highest keys so far; of equal ones the first."""

    def __init__(self, n_latents: int, k: int, window: int) -> None:
        self.k, self.window = k, window
        self.keys = torch.full((n_latents, 0), -torch.inf)
        self.rows = self.places = torch.zeros(n_latents, 0, dtype=torch.long)
        self.windows = torch.zeros(n_latents, 0, 2 * window + 1)

    def add(self, first: int, values: Tensor, places: Tensor, keys: Tensor) -> None:
        """Take in a batch: activations ``[batch, pos, latent]``, and each text's place and key ``[batch, latent]``."""
        best = keys.T.sort(dim=1, descending=True, stable=True)
        index = best.indices[:, : self.k]
        where = places.T.gather(1, index)
        padded = torch.nn.functional.pad(values, (0, 0, self.window, self.window))
        offsets = torch.arange(2 * self.window + 1)
        latent = torch.arange(values.shape[2])[:, None, None]
        around = padded[index[..., None], where[..., None] + offsets, latent]
        self.keys = torch.cat((self.keys.to(keys), best.values[:, : self.k]), 1)
        order = self.keys.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.keys = self.keys.gather(1, order)
        self.rows = torch.cat((self.rows, first + index), 1).gather(1, order)
        self.places = torch.cat((self.places, where), 1).gather(1, order)
        windows = torch.cat((self.windows.to(around), around), 1)
        self.windows = windows.gather(1, order[..., None].expand(-1, -1, windows.shape[2]))


@dataclass(frozen=True, eq=False)
class First:
    """Top texts, and share of tokens, smallest and largest activation above 0."""

    top: Kept
    frequency: Float[Tensor, " latent"]
    low: Float[Tensor, " latent"]
    high: Float[Tensor, " latent"]


def first_pass(source: Source, k: int, window: int) -> First:
    """Maxima and the texts of the highest activations."""
    n = len(source.latents)
    top, count = Kept(n, k, window), torch.zeros(n, dtype=torch.float64)
    low, high = torch.full((n,), torch.inf, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for first, values in source.batches():
        active = values > 0
        count += active.sum((0, 1))
        peaks, places = values.max(1)
        top.add(first, values, places, peaks.where(peaks > 0, -torch.inf))
        high = high.maximum(peaks.amax(0).double())
        low = low.minimum(values.where(active, torch.inf).amin((0, 1)).double())
    share = count / (source.tokens.shape[0] * source.tokens.shape[1])
    return First(top, share, low.where(low.isfinite(), 0.0), high)


@dataclass(frozen=True, eq=False)
class Second:
    """Texts drawn from each part of the range, the lowest first, and histograms."""

    drawn: list[Kept]
    counts: Int[Tensor, "latent bin"]


def second_pass(source: Source, first: First, window: int, bins: int, intervals: int, seed: int) -> Second:
    """Histograms and draws, from 0 to each latent's maximum."""
    n, high = len(source.latents), first.high.where(first.high > 0, 1.0)
    drawn, counts = [Kept(n, PER_INTERVAL, window) for _ in range(intervals)], torch.zeros(n * bins, dtype=torch.long)
    offsets = bins * torch.arange(n)
    for start, values in source.batches():
        bin_of = (values.double() / high * bins).long().clamp(max=bins - 1) + offsets
        counts += torch.bincount(bin_of[values > 0], minlength=n * bins)
        peaks, places = values.max(1)
        part = (peaks.double() / high * intervals).ceil().long() - 1  # -1 where not active
        draws = torch.stack([_draws(source, seed, start + row) for row in range(len(values))])
        for i, kept in enumerate(drawn):
            kept.add(start, values, places, draws.where(part == i, -torch.inf))
    return Second(drawn, counts.reshape(n, bins))


def _draws(source: Source, seed: int, row: int) -> Float[Tensor, " latent"]:
    """Random keys of one text, the same in any batch and for any choice of latents."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    return torch.rand(source.dictionary.coder.n_latents, generator=generator)[source.latents]
