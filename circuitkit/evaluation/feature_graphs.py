"""Whether an attribution graph's numbers come true: nodes are set to zero in the running model.

    edge s -> t    predicted: effect(s -> t), or that of all paths     measured: how much less t gets without s
    node s         predicted: effect of all paths to the final target  measured: how much lower that is without s

Constrained in all layers, direct effects and measured ones must be equal. In the mode ``frozen`` latents between s and
t react, in ``free`` attention and norms do so too; there a gap says how far the graph describes the model itself.

Measured are latents' pre-activations, and logits less their mean and before a soft cap. Biases are left out: where
anything is computed anew they are no thing of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError
from circuitkit.features.contrast import Contrast
from circuitkit.features.graph import FeatureGraph
from circuitkit.features.interventions import FeatureIntervention, latent_of, passes
from circuitkit.features.local import Reads
from circuitkit.features.passing import Passed
from circuitkit.features.readout import Readout
from circuitkit.features.replace import local_model
from circuitkit.features.running import MODES, Running
from circuitkit.features.targets import Target
from circuitkit.functional.agreement import r_squared, spearman
from circuitkit.models.hooked import Model

if TYPE_CHECKING:
    import plotly.graph_objects as go

Moved = Callable[[Passed, str], Tensor]
Edge = tuple[int, int]
SOURCES = ("latent", "error", "token", "position")


@dataclass(frozen=True)
class Checked:
    """Numbers of a graph next to what was measured.

    Args:
        names: of edges or nodes.
        predicted: by the graph.
        measured: in each mode.
    """

    names: tuple[str, ...]
    predicted: tuple[float, ...]
    measured: Mapping[str, tuple[float, ...]]

    def __len__(self) -> int:
        return len(self.names)

    def spearman(self, mode: str) -> float:
        """Rank correlation of predicted and measured."""
        return spearman(*self._both(mode))

    def r_squared(self, mode: str) -> float:
        """1 - sum (measured - predicted)^2 / sum (measured - mean)^2."""
        return r_squared(*self._both(mode))

    def _both(self, mode: str) -> tuple[Tensor, Tensor]:
        if mode not in self.measured:
            raise OptionError(f"got mode = {mode!r}, and measured were {', '.join(self.measured)}")
        return tuple(torch.tensor(x, dtype=torch.float64) for x in (self.predicted, self.measured[mode]))  # type: ignore[return-value]


@dataclass(frozen=True)
class Verification:
    """How far a graph's predictions came true on its prompt.

    Args:
        edges: those of largest magnitude.
        random_edges: drawn from all others.
        paths: the largest edges again, predicted through all paths from source to target.
        nodes: those of largest total effect on the final target.
        replacement_score: of the graph.
        completeness_score: of the graph.
        model: name of the model.
        n_tokens: of the prompt.
        seed: of the random edges.
    """

    edges: Checked
    random_edges: Checked
    paths: Checked
    nodes: Checked
    replacement_score: float
    completeness_score: float
    model: str
    n_tokens: int
    seed: int

    def __repr__(self) -> str:
        lines = [
            f"Verification({self.model}, {self.n_tokens} tokens: replacement {self.replacement_score:.2f}, "
            f"completeness {self.completeness_score:.2f})",
            f"{'Spearman / R2':<24}" + "".join(f"{mode:>18}" for mode in MODES),
        ]
        parts = (
            ("largest edges", self.edges), ("random edges", self.random_edges),
            ("largest, all paths", self.paths), ("nodes, all paths", self.nodes),
        )  # fmt: skip
        for label, part in parts:
            cells = (f"{part.spearman(m):>9.2f} / {part.r_squared(m):>6.2f}" for m in MODES if m in part.measured)
            lines.append(f"{f'{label} ({len(part)})':<24}" + "".join(cells))
        return "\n".join(lines)

    def plot(self) -> go.Figure:
        """Predicted against measured, one panel for the largest edges and one for nodes."""
        from circuitkit.figures.predicted_measured import predicted_measured

        return predicted_measured(self)


@torch.no_grad()
def verify(
    model: Model,
    dictionaries: Sequence[Dictionary],
    graph: FeatureGraph,
    *,
    n_edges: int = 100,
    n_nodes: int = 50,
    targets: Sequence[Target | Contrast] | None = None,
    frozen_mlps: bool = False,
    budget: int | str | None = None,
    seed: int = 0,
) -> Verification:
    """Set sources of edges to zero, one run each, and compare what happens with what the graph says.

    Args:
        model: the graph's model.
        dictionaries: the graph's dictionaries.
        graph: whole or pruned. Effects of nodes through all paths take the paths that are in it.
        n_edges: how many edges of largest magnitude, and as many random ones.
        n_nodes: how many nodes of largest total effect.
        targets: as given to the graph, if a `Direction` was among them.
        frozen_mlps: as given to the graph.
        budget: memory of runs side by side.
        seed: of the random edges.

    Raises:
        OptionError: if the graph belongs to another model or other dictionaries, or has no edge that can be tested.
    """
    from circuitkit.methods.plan import parse_bytes

    running = running_of(model, dictionaries, graph, frozen_mlps=frozen_mlps)
    readout = Readout.of_graph(running, graph, targets)
    rows = _rows(running, graph, readout)
    top, random = _edges(graph, n_edges, seed)
    totals = total_effects_of(graph)[0]
    worth = totals.abs() * graph.kind(*SOURCES)
    nodes = worth.topk(min(n_nodes, int(worth.count_nonzero()))).indices.tolist()
    sources = sorted({*nodes, *(source for _, source in top + random)})
    runs = [[FeatureIntervention(graph.nodes[source].name, 0.0)] for source in sources]
    wanted = list(dict.fromkeys(int(graph.targets[row]) for row, _ in top + random))
    edges, finals = _measured(running, readout, runs, [rows[t] for t in wanted], parse_bytes(budget))
    at, column = {source: i for i, source in enumerate(sources)}, {target: i for i, target in enumerate(wanted)}

    starts = torch.nn.functional.one_hot(torch.tensor(wanted, device=totals.device), len(graph))
    through = total_effects_of(graph, starts)

    def checked(chosen: Sequence[Edge], all_paths: bool = False) -> Checked:
        named = [(source, int(graph.targets[row])) for row, source in chosen]
        paths = [float(through[column[t], s]) for s, t in named]
        return Checked(
            tuple(f"{graph.nodes[s].name} -> {graph.nodes[t].name}" for s, t in named),
            tuple(paths if all_paths else (float(graph.effects[edge]) for edge in chosen)),
            {
                m: tuple(float(edges[m][at[s], column[t]]) for s, t in named)
                for m in (MODES[:2] if all_paths else MODES)
            },
        )

    strongest = Checked(
        tuple(graph.nodes[s].name for s in nodes), tuple(totals[nodes].tolist()),
        {m: tuple(float(y[at[s]]) for s in nodes) for m, y in finals.items() if m in MODES[:2]},
    )  # fmt: skip
    return Verification(
        checked(top), checked(random), checked(top, True), strongest, graph.replacement_score,
        graph.completeness_score, graph.model, len(graph.tokens), seed,
    )  # fmt: skip


def _measured(
    running: Running,
    readout: Readout,
    runs: Sequence[Sequence[FeatureIntervention]],
    watched: Sequence[Moved],
    budget: int | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each watched target, and what is explained, lost in each run, by mode."""
    edges, finals = dict[str, Tensor](), dict[str, Tensor]()
    for mode in MODES:
        of_edges, of_final = list[Tensor](), list[Tensor]()
        for passed in passes(running, runs, mode, watch=readout.sites, budget=budget):
            of_edges.append(-torch.stack([moved(passed, mode) for moved in watched], 1))
            of_final.append(-readout.moved(passed, mode))
        edges[mode], finals[mode] = torch.cat(of_edges), torch.cat(of_final)
    return edges, finals


def running_of(
    model: Model, dictionaries: Sequence[Dictionary], graph: FeatureGraph, *, frozen_mlps: bool = False
) -> Running:
    """The graph's prompt as a local replacement model. Raises OptionError if the graph's latents are not its own."""
    if graph.counts is not None:
        raise OptionError("got a graph merged from several prompts, which no one run can test; give each prompt's own")
    local = local_model(model, dictionaries, graph.tokens, frozen_mlps=frozen_mlps)
    running = Running(model, local)
    for node in graph.nodes:
        if node.kind == "latent":
            site, index, at = latent_of(local, node.name)
            value = float(running.clean.latents[site][at, index])
            if abs(value - node.value) > 1e-2 * max(abs(value), abs(node.value)):
                raise OptionError(
                    f"{node.name} is {node.value:.4g} in the graph and {value:.4g} here; give the model and the "
                    "dictionaries that the graph was made with"
                )
    return running


def total_effects_of(
    graph: FeatureGraph, starts: Float[Tensor, "start node"] | None = None
) -> Float[Tensor, "start node"]:
    """Effect of every node on some weighted targets, through all paths of the graph.

    What a latent hands on is in proportion to what it gets, so its slope is its own total over its value.

    Args:
        graph: the graph.
        starts: weights of targets, one row for each sum of them; the graph's own weights if None.
    """
    starts = graph.weights.double()[None] if starts is None else starts.double()
    out = torch.zeros_like(starts)
    values = torch.tensor([node.value for node in graph.nodes], dtype=torch.float64, device=out.device)
    rows = graph.stages[graph.targets]
    for stage in rows.unique(sorted=True).flip(0):
        some = (rows == stage).nonzero().flatten()
        numbers = graph.targets[some]
        handed_on = torch.where(out[:, numbers] != 0, out[:, numbers] / values[numbers], 0.0)
        out += (starts[:, numbers] + handed_on) @ graph.effects[some].double()
    return out


def _rows(running: Running, graph: FeatureGraph, readout: Readout) -> dict[int, Moved]:
    """How far the target of each row of the graph moved: a latent's pre-activation, or one of the final targets."""
    finals = dict(zip((graph.weights != 0).nonzero().flatten().tolist(), readout.finals, strict=True))
    by_site = {a.reads.site: a for a in running.local.active}
    found: dict[int, Moved] = {}
    for number in graph.targets.tolist():
        if number in finals:
            found[number] = Readout(running, (finals[number],), (1.0,)).moved
            continue
        site, index, at = latent_of(running.local, graph.nodes[number].name)
        nodes = by_site[site].nodes
        here = (nodes.positions == at) & (nodes.index == index)
        found[number] = partial(_latent_moved, by_site[site].reads.take(here.nonzero().flatten()))
    return found


def _latent_moved(reads: Reads, passed: Passed, _mode: str) -> Float[Tensor, " row"]:
    return passed.moved(reads)[:, 0]


def _edges(graph: FeatureGraph, n: int, seed: int) -> tuple[list[Edge], list[Edge]]:
    """The edges of largest magnitude, and as many random other ones, each as (row, source)."""
    size = (graph.effects.abs() * graph.kind(*SOURCES)).flatten()
    there = size.nonzero().flatten()
    if not len(there) or n < 1:
        raise OptionError(f"got n_edges = {n} and a graph with {len(there)} edges to test, expected at least 1 of each")
    best = size[there].topk(min(n, len(there))).indices
    left = torch.ones(len(there), dtype=torch.bool, device=there.device)
    left[best] = False
    rest = there[left]
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:n].to(rest.device)]

    def pairs(flat: Tensor) -> list[Edge]:
        return [divmod(i, len(graph)) for i in flat.tolist()]

    return pairs(there[best]), pairs(drawn)
