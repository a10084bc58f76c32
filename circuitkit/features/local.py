"""The local replacement model of one prompt: a linear map from what is written to what latents read.

    x_p = sum over sources s of  (frozen maps from s to p) v_s          exactly, for every tensor of the run

Sources are token and position vectors, active latents (activation times decoder row), errors (what a dictionary does
not reconstruct) and biases. Maps are those of `circuitkit.features.frozen`. The stream passes ``steps`` from below;
a step is a stage on the stream itself, or components that read one and the same stream and add to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.features.frozen import FrozenMap


@dataclass(frozen=True)
class Nodes:
    """Consecutive sources of one kind.

    Args:
        kind: ``token``, ``position``, ``latent``, ``error`` or ``bias``.
        site: where latents are read, where errors are written, the component that biases belong to.
        first: column of the first one.
        positions: of each; -1 for a bias, which acts at all of them.
        index: latent or token id; -1 otherwise.
        values: activations of latents, 1 otherwise.
    """

    kind: str
    site: Site
    first: int
    positions: Int[Tensor, " source"]
    index: Int[Tensor, " source"]
    values: Float[Tensor, " source"]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, eq=False)
class Writes:
    """What consecutive sources write at one site.

    Args:
        first: column of the first one.
        positions: of each vector, never falling.
        vectors: what is written, activations in it.
        shared: whether all vectors belong to the first column (a bias).
        prompts: how many prompts lie one after the other; each has a shared column of its own.
    """

    first: int
    positions: Int[Tensor, " write"]
    vectors: Float[Tensor, "write d"]
    shared: bool = False
    prompts: int = 1

    @cached_property
    def starts(self) -> list[int]:
        """How many vectors lie before each position, and in all."""
        if not len(self.positions):
            return [0]
        n = int(self.positions[-1]) + 1
        edges = torch.arange(n + 1, device=self.positions.device)
        found: list[int] = torch.searchsorted(self.positions.contiguous(), edges).tolist()
        return found

    def before(self, n: int) -> int:
        """How many vectors lie at the first ``n`` positions."""
        return self.starts[min(n, len(self.starts) - 1)]

    @cached_property
    def padded(self) -> tuple[Float[Tensor, "pos most d"], Int[Tensor, " write"]]:
        """The vectors with positions on an axis of their own, zeros behind them, and where each one went."""
        counts = torch.tensor(self.starts, device=self.vectors.device).diff()
        most = int(counts.max()) if len(counts) else 0
        order = torch.arange(len(self.positions), device=self.vectors.device)
        if len(counts) and bool((counts == most).all()):  # as many at each, as of the k largest: no copy
            return self.vectors.unflatten(0, (len(counts), most)), order
        place = self.positions * most + order - torch.tensor(self.starts, device=order.device)[self.positions]
        out = self.vectors.new_zeros(len(counts) * most, self.vectors.shape[1])
        out[place] = self.vectors
        return out.unflatten(0, (len(counts), most)), place


@dataclass(frozen=True, eq=False)
class Stage:
    """One tensor of the run.

    Args:
        site: which one.
        before: from the tensor below (the stream, for the first of a component); None if nothing comes through,
            because the writes at this stage stand for all of it.
        cut: whether what is passed on is put together from ``outer`` alone, as behind a sparse autoencoder.
        outer: what is written behind a cut: latents, error, offset. Targets at this stage do not see it.
        inner: what is written before it, and seen by targets at this stage.
    """

    site: Site
    before: FrozenMap | None
    cut: bool = False
    outer: tuple[Writes, ...] = ()
    inner: tuple[Writes, ...] = ()


Component = tuple[Stage, ...]
Step = Stage | tuple[Component, ...]


@dataclass(frozen=True, eq=False)
class Reads:
    """Targets at one site, each a vector that is multiplied with the tensor there.

    Args:
        site: where.
        positions: of each target.
        vectors: of each target.
        constants: what is added to the product: a target's own bias.
        values: what product and constant came to in the run.
    """

    site: Site
    positions: Int[Tensor, " target"]
    vectors: Float[Tensor, "target d"]
    constants: Float[Tensor, " target"]
    values: Float[Tensor, " target"]

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, which: Tensor) -> Reads:
        """Some of the targets."""
        parts = (self.positions, self.vectors, self.constants, self.values)
        return Reads(self.site, *(part[which] for part in parts))


@dataclass(frozen=True, eq=False)
class Active:
    """The active latents of one dictionary on one prompt, by position and then by number."""

    dictionary: Dictionary
    nodes: Nodes
    reads: Reads


@dataclass(frozen=True, eq=False)
class LocalModel:
    """See the module's text.

    Args:
        tokens: the prompt.
        steps: from the input to the final stream.
        nodes: all sources, in order of columns.
        active: the latents of each dictionary.
        values: the tensor at every site.
        logits: at every position, in float32 or better.
        causal: whether no position sees a later one.
        prompts: how many prompts of equal length lie one after the other; each sees itself only, and a row of a sweep
            has one target in each of them.
    """

    tokens: Int[Tensor, " pos"]
    steps: tuple[Step, ...]
    nodes: tuple[Nodes, ...]
    active: tuple[Active, ...]
    values: Mapping[Site, Float[Tensor, "pos _"]]
    logits: Float[Tensor, "pos vocab"]
    causal: bool = True
    prompts: int = 1

    @property
    def n_sources(self) -> int:
        """How many columns there are."""
        last = self.nodes[-1]
        return last.first + len(last)

    @property
    def final(self) -> Site:
        """The stream after the last block."""
        stage = self.steps[-1]
        assert isinstance(stage, Stage)
        return stage.site

    @cached_property
    def ranks(self) -> dict[Site, int]:
        """Number of every site, in order of computation."""
        return {stage.site: i for i, stage in enumerate(self.stages())}

    def stages(self) -> Iterator[Stage]:
        """All stages, in order of computation."""
        for step in self.steps:
            for component in ((step,),) if isinstance(step, Stage) else step:
                yield from component

    @cached_property
    def bias_columns(self) -> dict[Site, int]:
        """The column of each component's biases."""
        return {nodes.site: nodes.first for nodes in self.nodes if nodes.kind == "bias"}

    def bias_column(self, site: Site) -> int:
        """The column of the biases of the component that a site belongs to."""
        return self.bias_columns[owner(site)]


def same_site(site: Site) -> Site:
    """The name under which a tensor is known here: what leaves a block is what enters the next one."""
    return Site("resid-pre", site.layer + 1) if site.kind == "resid-post" else site


def owner(site: Site) -> Site:
    """The component of a site: its attention, its MLP, or the stream."""
    if site.kind in ("z", "attn-out"):
        return Site("attn-out", site.layer)
    return Site("mlp-out", site.layer) if site.kind in ("mlp-in", "mlp-out") else same_site(site)
