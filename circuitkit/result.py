"""What was measured: `Result` of a circuit on a task, and `NodeScores` of single components."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

    from circuitkit.circuit import Circuit


LEAST_EXAMPLES = 8
LEAST_SHARE = 0.01  # of the behaviour; a circuit that keeps less is no circuit of it, however little random ones keep
SITE_WORDS = {
    "resid": "residual stream",
    "head": "head output",
    "pattern": "attention pattern",
    "mlp": "MLP output",
    "neuron": "MLP neurons",
}


@dataclass(frozen=True, eq=False)
class NodeScores:
    """One number per component, or per component and position; positive supports the behaviour.

    Args:
        values: effect on the metric, mean over examples; NaN where no example has the position.
        stderr: standard error of each mean.
        rows: labels of the first axis.
        columns: labels of the second axis.
        clean: metric of the whole model on clean inputs.
        corrupt: metric of the whole model on corrupt inputs.
        method: the registered name.
        options: the method's options as used.
        n_examples: how many examples the mean is over.
        provenance: task, model, seconds.
        signed: False if only magnitudes mean something.
    """

    values: Float[Tensor, "row column"]
    stderr: Float[Tensor, "row column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    clean: float
    corrupt: float
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    n_examples: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    signed: bool = True

    @property
    def normalised(self) -> Float[Tensor, "row column"]:
        """Effects as a share of clean - corrupt; NaN if these are equal."""
        gap = self.clean - self.corrupt
        return self.values / (gap if abs(gap) > 1e-9 else math.nan)

    def to_pandas(self) -> pandas.DataFrame:
        """A table with the rows and columns of the heat map."""
        import pandas as pd

        return pd.DataFrame(self.values.tolist(), index=list(self.rows), columns=list(self.columns))

    def plot(self) -> go.Figure:
        """The usual heat map: layers (or components) up, positions (or heads) across; 1 is the whole effect."""
        from circuitkit.figures.heatmap import position_heatmap

        site, direction = (str(self.options.get(name) or "") for name in ("site", "direction"))
        if "hold" in self.options:
            hold = int(self.options["hold"])
            site = site or "state"
            direction += ", kick" if hold == 1 else f", held for {hold} steps" if hold else ", held to the end"
        title = ", ".join(filter(None, (str(self.provenance.get("task", "")), SITE_WORDS.get(site, site), direction)))
        across = "position, counted back from the last token" if self.columns[-1] == "end" else "head"
        up = "layer and head" if "H" in self.rows[0] else "layer"
        if "hold" in self.options:
            across, up = "step, counted back from the last", "node"
        elif not self.rows[0].startswith("L"):  # components by name, and what was done to each
            across, up = "", "component"
        upward = self.rows[0].startswith("L")
        whole = f"the whole effect of the corrupt input (clean {self.clean:.3g}, corrupt {self.corrupt:.3g})"
        figure = position_heatmap(
            self.normalised, list(self.rows), list(self.columns), title, upward=upward, whole=whole
        )
        return figure.update_layout(xaxis_title=across, yaxis_title=up)

    def __repr__(self) -> str:
        return f"NodeScores({self.method}, {len(self.rows)} x {len(self.columns)}, {self.n_examples} examples)"


@dataclass(frozen=True, eq=False)
class ParetoPoint:
    """The circuit that a method chose with one value of an option, and what it was measured to do.

    Args:
        option: name of the option, as ``tau``.
        value: its value.
        circuit: the circuit, dangling edges pruned.
        fidelity: mean of the metric that judged, over examples; minus the KL divergence by default.
        objective: name of that metric.
        faithfulness: normalised, by the task's own metric; None where it is undefined.
    """

    option: str
    value: float
    circuit: Circuit
    fidelity: float
    objective: str
    faithfulness: float | None

    @property
    def n_edges(self) -> int:
        """Edges in the circuit."""
        return len(self.circuit)


@dataclass(frozen=True)
class CurvePoint:
    """Faithfulness at one size of circuit.

    Args:
        fraction: nominal share of all edges, as MIB counts it.
        n_edges: edges left after pruning the dangling ones.
        faithfulness: normalised; None where it is undefined.
        absolute: whether edges were ranked by magnitude (True) or by signed score (False).
    """

    fraction: float
    n_edges: int
    faithfulness: float | None
    absolute: bool


@dataclass(frozen=True)
class Result:
    """What a circuit was measured to do on a task. Metric means are over examples.

    Args:
        task: the task's name.
        metric: the metric's name; bigger means the behaviour is done better.
        corrupt_value: what removed edges carry: counterfactual, mean, position-mean, zero or optimal.
        clean: metric of the whole model on clean inputs.
        corrupt: metric with every edge removed.
        circuit: metric with the edges outside the circuit removed.
        faithfulness: (circuit - corrupt) / (clean - corrupt), a ratio of means; None if clean equals corrupt.
        faithfulness_interval: 95 % bootstrap interval over examples, or None.
        random_faithfulness: mean over random connected circuits of the same number of edges, or None.
        random_interval: lowest and highest of those, or None.
        gap_interval: 95 % bootstrap interval of clean - corrupt: whether there is a behaviour at all.
        n_edges: edges in the circuit.
        n_possible: edges in the graph.
        n_examples: examples measured.
        curve_points: faithfulness at the sizes of MIB's grid, signed and absolute; empty if no ranking was known.
        cpr: area under the signed curve (MIB's circuit performance ratio), or None.
        cmd: area between the absolute curve and 1 (MIB's circuit-model distance), or None.
        log_area: area under the signed curve over log10 of the size, divided by its width, or None.
        mean_of_ratios: mean over examples of each one's own (circuit - corrupt) / (clean - corrupt), or None; a few
            examples with a small denominator can rule it, so `faithfulness`, a ratio of means, is the summary.
        ratios_left_out: examples left out of that mean, because their own clean - corrupt is zero up to rounding.
        known: AUROC of the ranking and precision and recall of the circuit against the known circuit, or None.
        seconds: wall-clock time of the evaluation.
        seed: seed of the random circuits and the bootstrap.
    """

    task: str
    metric: str
    corrupt_value: str
    clean: float
    corrupt: float
    circuit: float
    faithfulness: float | None
    faithfulness_interval: tuple[float, float] | None
    random_faithfulness: float | None
    random_interval: tuple[float, float] | None
    n_edges: int
    n_possible: int
    n_examples: int
    gap_interval: tuple[float, float] | None = None
    curve_points: tuple[CurvePoint, ...] = ()
    cpr: float | None = None
    cmd: float | None = None
    log_area: float | None = None
    known: Mapping[str, float | None] | None = None
    seconds: float = 0.0
    seed: int = 0
    mean_of_ratios: float | None = None
    ratios_left_out: int = 0

    @property
    def defined(self) -> bool:
        """Whether faithfulness has a meaning: clean and corrupt metrics differ."""
        return self.faithfulness is not None

    @property
    def better_than_chance(self) -> bool:
        """Whether there is a behaviour, and the circuit carries more of it than every random circuit of its size."""
        return self.verdict == "better than chance"

    @property
    def verdict(self) -> str:
        """In words: ``better than chance``, ``no better than chance`` and why, or ``not known`` and why.

        The reasons, in order: corrupting the input changes nothing or does not lower the metric (its 95 % interval
        reaches zero); the circuit is empty; it keeps next to nothing; the interval of its faithfulness reaches down to
        a random circuit's. With fewer than `LEAST_EXAMPLES` examples, or with no other circuit of that size, it says
        ``not known``, and why.
        """
        if self.faithfulness is None:
            return "no better than chance: corrupting the input changes nothing, so faithfulness is undefined"
        if self.n_edges == 0:
            return "no better than chance: the circuit is empty; ask for more edges"
        if self.faithfulness_interval is None or self.n_examples < LEAST_EXAMPLES:
            return f"not known: {self.n_examples} examples are too few for an interval; use {LEAST_EXAMPLES} or more"
        if self.gap_interval is not None and self.gap_interval[0] <= 0:
            return "no better than chance: corrupting the input does not lower the metric, so there is no behaviour"
        if self.faithfulness < LEAST_SHARE:
            return f"no better than chance: the circuit keeps less than {LEAST_SHARE:.0%} of the behaviour"
        if self.random_interval is None:
            return "not known: there is no other circuit of this size to compare with"
        if self.faithfulness_interval[0] <= self.random_interval[1]:
            return "no better than chance: a random circuit of the same size does as well"
        return "better than chance"

    def curve(self) -> go.Figure:
        """Faithfulness against circuit size as a plotly figure."""
        from circuitkit.figures.curve import faithfulness_curve

        return faithfulness_curve(self)
