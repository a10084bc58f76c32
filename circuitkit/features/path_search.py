"""Greedy search for the paths through which a target got its value, from the target down.

Each round takes all paths of the last one apart, extends each by its largest contributions and keeps the best of all.
A path's contribution is the product of all derivatives along it times the value of its last source, in units of the
target: what went into the target along this path and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.features.local import Reads
from circuitkit.features.transcoder_paths import Hop, Parts, PathSteps, Vectors, columns_of

Keep = Callable[[Hop], bool]


@dataclass(frozen=True)
class Path:
    """Steps from the target down.

    Args:
        hops: what is stepped to, the last one lowest.
        contributions: of the path up to each hop, in units of the target.
        bound: the smallest activation of a latent on the path, the target's too if it is one.
    """

    hops: tuple[Hop, ...] = ()
    contributions: tuple[float, ...] = ()
    bound: float = float("inf")

    @property
    def contribution(self) -> float:
        """What the target got along this path, in its units."""
        return self.contributions[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all hops."""
        return tuple(hop.node.name for hop in self.hops)

    def __str__(self) -> str:
        return f"{self.contribution:+.4g}  " + " <- ".join(self.names)

    def to(self, hop: Hop, contribution: float) -> Path:
        """The path with one more step."""
        bound = min(self.bound, hop.node.value) if hop.node.kind == "latent" else self.bound
        return Path((*self.hops, hop), (*self.contributions, contribution), bound)


@dataclass(frozen=True)
class Opened:
    """A path that was taken apart.

    Args:
        path: the path; without hops, the target itself.
        total: what there was to share out, in units of the target.
        error: what came from errors of transcoders, and from MLPs without one.
        bias: what came from constants.
    """

    path: Path
    total: float
    error: float
    bias: float


@torch.no_grad()
def search(
    steps: PathSteps, target: Reads, *, latent: bool, depth: int, beam: int, cap: bool, keep: Keep | None
) -> tuple[tuple[Path, ...], tuple[Opened, ...]]:
    """Paths that were kept in any round, and all that was taken apart for them.

    Args:
        steps: of the prompt's local replacement model.
        target: what is explained.
        latent: whether that is a latent, whose activation bounds paths as well.
        depth: how many rounds.
        beam: how many paths are kept in each.
        cap: whether paths are ranked by no more than their bound.
        keep: which hops may be on a path; None for all.
    """
    kept, opened = list[Path](), list[Opened]()
    paths, vectors = [Path(bound=float(target.values[0]) if latent else float("inf"))], steps.start(target)
    for _ in range(depth):
        parts = steps.parts(vectors)
        opened += _opened(steps, paths, vectors, parts)
        found = [
            (path.to(hop, float(parts.flat[row, choice])), row, choice)
            for row, path in enumerate(paths)
            for hop, choice in _largest(steps, _in_order(steps, parts.flat[row], path, cap), vectors, row, beam, keep)
        ]
        found = sorted(found, key=lambda one: _rank(one[0], cap), reverse=True)[:beam]
        kept += [path for path, _, _ in found]
        going = [one for one in found if not one[0].hops[-1].ends]
        if not going:
            break
        paths = [path for path, _, _ in going]
        vectors = Vectors.cat([steps.follow(vectors, row, c, parts.flat[row, c]) for _, row, c in going])
    return tuple(kept), tuple(opened)


def _rank(path: Path, cap: bool) -> tuple[float, float]:
    size = abs(path.contribution)
    # All that reaches one bound ranks alike by it.
    return (min(size, path.bound) if cap else size), size


def _in_order(steps: PathSteps, row: Float[Tensor, " choice"], path: Path, cap: bool) -> Int[Tensor, " choice"]:
    """The sources that a path may step to, those of highest rank first."""
    size = row.abs() * steps.choices
    order = size.argsort(descending=True, stable=True)[: int(size.count_nonzero())]
    if not cap:
        return order
    capped = torch.minimum(size, steps.bounds.clamp(max=path.bound))
    return order[capped[order].argsort(descending=True, stable=True)]


def _largest(
    steps: PathSteps, order: Int[Tensor, " choice"], vectors: Vectors, row: int, most: int, keep: Keep | None
) -> Iterator[tuple[Hop, int]]:
    """The first sources that are wanted."""
    position, n = int(vectors.positions[row]), 0
    for choice in (order if keep else order[:most]).tolist():
        hop = steps.hop(choice, position)
        if keep is None or keep(hop):
            yield hop, choice
            n += 1
            if n == most:
                return


def _opened(steps: PathSteps, paths: list[Path], vectors: Vectors, parts: Parts) -> list[Opened]:
    nodes = steps.local.nodes
    error, bias = (parts.sources[:, columns_of(nodes, kind)].sum(1) for kind in ("error", "bias"))
    rests = zip(paths, vectors.totals.tolist(), error.tolist(), (bias + parts.constants).tolist(), strict=True)
    return [Opened(*one) for one in rests]
