"""The number that an attribution graph explains, read off a run: a weighted sum of its final targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Site
from circuitkit.errors import OptionError
from circuitkit.features.contrast import Contrast, all_finals, contrasted
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.inputs import unembedding
from circuitkit.features.local import same_site
from circuitkit.features.passing import Passed
from circuitkit.features.running import Running
from circuitkit.features.targets import Direction, Final, Latent, Target, final_targets


@dataclass(frozen=True, eq=False)
class Readout:
    """A weighted sum of targets.

    Args:
        running: the prompt's local replacement model.
        finals: the targets.
        weights: of each.
    """

    running: Running
    finals: tuple[Final, ...]
    weights: tuple[float, ...]

    @classmethod
    def of_graph(
        cls, running: Running, graph: FeatureGraph, targets: Sequence[Target | Contrast] | None = None
    ) -> Readout:
        """What a graph explains, with its own weights.

        Args:
            targets: as given to the graph; needed only where a `Direction` is among them, which a graph does not keep.

        Raises:
            OptionError: if the graph explains something else, or something that cannot be measured here.
        """
        nodes = [(node, float(graph.weights[i])) for i, node in enumerate(graph.nodes) if float(graph.weights[i]) != 0]
        if targets is None:
            targets = [_target(node.kind, node.site, node.position, node.index, node.name) for node, _ in nodes]
        left, finals = list(all_finals(running.model, running.local, targets)), list[Final]()
        for node, _ in nodes:
            found = next((final for final in left if _is(final, node)), None)
            if found is None or len(left) + len(finals) != len(nodes):
                raise OptionError(f"got {len(targets)} targets, and the graph explains {[n.name for n, _ in nodes]}")
            left.remove(found)
            finals.append(found)
        return cls(running, tuple(finals), tuple(weight for _, weight in nodes))

    @classmethod
    def of(cls, running: Running, target: Target | tuple[int, int]) -> Readout:
        """One target, or the logit of one token less that of another."""
        several = list(target) if isinstance(target, tuple) else [target]
        finals = tuple(final_targets(running.model, running.local, several))
        return cls(running, finals, (1.0, -1.0)[: len(finals)])

    @property
    def sites(self) -> set[Site]:
        """What a run must look at."""
        return {final.reads.site for final in self.finals}

    @property
    def clean(self) -> float:
        """In the run without changes."""
        return sum(w * float(f.reads.values[0]) for w, f in zip(self.weights, self.finals, strict=True))

    def moved(self, passed: Passed, mode: str) -> Float[Tensor, " row"]:
        """How far the number moved in each run."""
        return torch.stack(
            [w * self._moved(f, passed, mode) for w, f in zip(self.weights, self.finals, strict=True)]
        ).sum(0)

    def _moved(self, final: Final, passed: Passed, mode: str) -> Float[Tensor, " row"]:
        two = contrasted(final.label) if final.kind == "direction" else None
        if mode != "free" or not (final.kind == "logit" or two):
            return passed.moved(final.reads)[:, 0]
        weight = unembedding(self.running.model)[0].to(passed.stream)
        norm, position = self.running.model.wiring.final_norm, final.reads.positions[0]
        direction = weight[:, two[0]] - weight[:, two[1]] if two else weight[:, final.index] - weight.mean(1)

        def logit(x: Tensor) -> Tensor:
            return (x if norm is None else norm(x)) @ direction

        return logit(passed.stream[:, position]) - logit(self.running.own.values[final.reads.site][position])


def _is(final: Final, node: FeatureNode) -> bool:
    """Whether a target is a node's: a graph has latents in order of columns, and behind them the others as given."""
    at, site = int(final.reads.positions[0]), same_site(Site.parse(node.site))
    if (final.kind, at, final.reads.site) != (node.kind, node.position, site):
        return False
    return node.name.startswith(f"{final.label}@") if final.kind == "direction" else final.index == node.index


def _target(kind: str, site: str, position: int | None, index: int | None, name: str) -> Target | Contrast:
    two = contrasted(name.partition("@")[0])
    if kind == "direction" and two:
        return Contrast(*two)
    if kind == "logit" and index is not None:
        return index
    if kind == "latent" and position is not None and index is not None:
        return Latent(Site.parse(site), position, index)
    known = f"a {Direction.__name__}'s vector is not kept in a graph: give ``targets`` as you gave them to the graph"
    raise OptionError(f"the graph explains {name!r}, which cannot be measured from the graph alone; {known}")
