"""Circuits measured against other circuits: the same task found again, other tasks, tasks with nothing to find.

The functions that fill these are in `circuitkit.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from circuitkit.measures import Measure

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Stability(Measure):
    """How much a circuit changes when it is found again.

    Args:
        task: the task's name.
        method: how edges were scored.
        options: the method's options.
        vary: ``examples`` (bootstrap resamples), ``task-seed`` (fresh examples) or ``method-seed``.
        n_edges: edges asked for.
        n_examples: examples of the task.
        jaccard: mean over pairs of circuits of shared / all edges.
        jaccard_quantiles: 2.5 %, 50 % and 97.5 % of the pairs.
        reference_jaccard: mean over circuits of that to the circuit of the task as it was given.
        chance: the same mean if edges were drawn at random.
        edges: names of all edges that were chosen at least once, most frequent first.
        frequency: the share of circuits that have each.
        in_reference: whether the circuit of the task as it was given has each.
        times: how many circuits were found.
        seed: seed of the resamples, or the first of the seeds.
    """

    kind: ClassVar[str] = "stability"
    task: str
    method: str
    options: Mapping[str, Any]
    vary: str
    n_edges: int
    n_examples: int
    jaccard: float
    jaccard_quantiles: tuple[float, float, float]
    reference_jaccard: float
    chance: float
    edges: tuple[str, ...]
    frequency: tuple[float, ...]
    in_reference: tuple[bool, ...]
    times: int
    seed: int = 0

    def core(self, share: float = 0.95) -> tuple[str, ...]:
        """Edges that at least this share of the circuits have."""
        return tuple(name for name, f in zip(self.edges, self.frequency, strict=True) if f >= share)

    def plot(self) -> go.Figure:
        """How often each edge is chosen."""
        from circuitkit.figures.comparison import stability_bars

        return stability_bars(self)


@dataclass(frozen=True)
class Overlap(Measure):
    """What circuits on one graph share.

    Args:
        level: ``edges``, ``nodes`` (components that write) or ``heads``.
        names: of the circuits.
        sizes: edges or components of each.
        n_possible: how many the graph has.
        shared: how many each pair has in common; the diagonal is `sizes`.
    """

    kind: ClassVar[str] = "overlap"
    level: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    n_possible: int
    shared: tuple[tuple[int, ...], ...]

    def jaccard(self, a: int, b: int) -> float:
        """Shared over all: 1 for equal circuits, also for two empty ones."""
        together = self.sizes[a] + self.sizes[b] - self.shared[a][b]
        return self.shared[a][b] / together if together else 1.0

    def reuse(self, a: int, b: int) -> float:
        """Share of circuit ``a`` that ``b`` has too, as Merullo et al. 2024 count reuse; 1 if ``a`` is empty."""
        return self.shared[a][b] / self.sizes[a] if self.sizes[a] else 1.0

    def expected(self, a: int, b: int) -> float:
        """Mean number shared by random sets of these sizes."""
        return self.sizes[a] * self.sizes[b] / self.n_possible

    def p_value(self, a: int, b: int) -> float:
        """Chance that random sets of these sizes share as much (hypergeometric)."""
        from circuitkit.functional.significance import overlap_p

        return overlap_p(self.n_possible, self.sizes[a], self.sizes[b], self.shared[a][b])

    def plot(self) -> go.Figure:
        """A heat map of the Jaccard indices."""
        from circuitkit.figures.comparison import overlap_heatmap

        return overlap_heatmap(self)


@dataclass(frozen=True)
class Control:
    """A circuit found where there is nothing to find.

    Args:
        shuffled: what was shuffled: ``answers``, ``swap`` or ``corrupt``.
        seed: of the shuffle.
        faithfulness: of the circuit found on the shuffled task, measured on the real one; None where undefined.
        jaccard: edges shared with the real circuit over all.
        strength: sum of the magnitudes of its edges' scores, over that of the real circuit's.
        verdict: what `Result.verdict` says of it on the shuffled task itself.
    """

    shuffled: str
    seed: int
    faithfulness: float | None
    jaccard: float
    strength: float
    verdict: str


@dataclass(frozen=True)
class Controls(Measure):
    """A circuit next to circuits found on shuffled versions of its task, and to random ones.

    Args:
        task: the task's name.
        method: how edges were scored.
        options: the method's options.
        n_edges: edges of the real circuit.
        n_examples: examples of the task.
        faithfulness: of the circuit found on the real task; None where undefined.
        faithfulness_interval: its 95 % bootstrap interval, or None.
        random: faithfulness of random connected circuits of as many edges.
        controls: the circuits found on shuffled tasks.
        verdict: what `Result.verdict` says of the real circuit.
        seed: seed of the first shuffle and of the random circuits.
    """

    kind: ClassVar[str] = "controls"
    task: str
    method: str
    options: Mapping[str, Any]
    n_edges: int
    n_examples: int
    faithfulness: float | None
    faithfulness_interval: tuple[float, float] | None
    random: tuple[float, ...]
    controls: tuple[Control, ...]
    verdict: str
    seed: int = 0

    @property
    def passed(self) -> bool:
        """Whether there is something on the real task, and nothing where labels are shuffled.

        That is: the real circuit is better than chance there, and none found on shuffled labels is on its own task. The
        ``corrupt`` shuffle does not count: where corrupt inputs are interchangeable it leaves a fair task.
        """
        labels = [control for control in self.controls if control.shuffled != "corrupt"]
        return self.verdict == "better than chance" and all(c.verdict != "better than chance" for c in labels)

    def plot(self) -> go.Figure:
        """The faithfulness of the circuit, the controls' and the random circuits'."""
        from circuitkit.figures.comparison import controls_strip

        return controls_strip(self)
