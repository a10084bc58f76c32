"""Attribution through latents, with those of little weight silenced on the way: Ge et al.'s hierarchical attribution.

    attr(s) = value of s * d target / d s          through all paths, latents included; gates, patterns, scales frozen

One sweep from the targets down. A latent's attribution is complete when the sweep reaches the site that it reads; if
it is below tau there, its gradient is zeroed before it goes on, so that lower sources are scored through the latents
that stay and through nothing else. With tau = 0 nothing is silenced, and what is not a latent (tokens, positions,
errors, biases) adds up to the target's value.

Reference: Ge et al. 2024, "Automatically Identifying Local and Global Circuits with Linear Computation Graphs",
arXiv:2405.13868.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.features.local import LocalModel, Reads, Stage, same_site
from circuitkit.features.sweep import Effects, contract


@torch.no_grad()
def total_effects(local: LocalModel, reads: Sequence[Reads], tau: float = 0.0) -> Effects:
    """Attribution of every source to each target, in the target's units.

    Args:
        local: the local replacement model.
        reads: the targets, in the order of `circuitkit.features.sweep.in_order`.
        tau: latents with less than this, in magnitude, pass nothing on; their own entry stays.
    """
    return _Totals(local, reads, tau).effects()


class _Totals:
    """Gradients of a few targets, all rows from the beginning."""

    def __init__(self, local: LocalModel, reads: Sequence[Reads], tau: float) -> None:
        self.local, self.tau = local, tau
        self.targets, rows = dict[object, tuple[int, Reads]](), 0
        for r in reads:
            self.targets[r.site] = rows, r
            rows += len(r)
        self.latents = {same_site(a.dictionary.read): a for a in local.active}
        like = local.values[local.final]
        self.stream = like.new_zeros(rows, *like.shape)
        self.out = like.new_zeros(rows, local.n_sources)

    def effects(self) -> Effects:
        for step in reversed(self.local.steps):
            if isinstance(step, Stage):
                self.stream = self._at(step, self.stream)
                continue
            parts = []
            for component in step:
                g = self.stream
                for stage in reversed(component):
                    g = self._at(stage, g)
                    g = torch.zeros_like(self.stream) if stage.before is None else stage.before.pull(g)
                parts.append(g)
            self.stream = self.stream + torch.stack(parts).sum(0)
        return self.out

    def _at(self, stage: Stage, g: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        g = g.clone()
        if stage.cut:
            contract(stage.outer, g, self.out)
            g.zero_()
        if stage.site in self.targets:
            first, reads = self.targets[stage.site]
            rows = torch.arange(first, first + len(reads), device=g.device)
            g[rows, reads.positions] += reads.vectors
            if bool(reads.constants.any()):
                self.out[rows, self.local.bias_column(stage.site)] += reads.constants
        if stage.site in self.latents:
            self._pass_on(stage, g)
        contract(stage.inner, g, self.out)
        return g

    def _pass_on(self, stage: Stage, g: Float[Tensor, "row pos d"]) -> None:
        """Add what latents that read here hand on of their gradients."""
        active = self.latents[stage.site]
        nodes, reads = active.nodes, active.reads
        attribution = self.out[:, nodes.first : nodes.first + len(nodes)]
        gradient = torch.where(attribution.abs() >= self.tau, attribution / nodes.values, 0.0)
        for row, slopes in enumerate(gradient):
            g[row].index_add_(0, reads.positions, slopes[:, None] * reads.vectors)
        self.out[:, self.local.bias_column(stage.site)] += gradient @ reads.constants
