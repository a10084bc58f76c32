"""What a person reads at the end of a run: small rich tables made from a circuit, never printed here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from circuitkit.features.graph import FeatureGraph
from circuitkit.features.running import MODES
from circuitkit.result import NodeScores, Result

if TYPE_CHECKING:
    from circuitkit.circuit import Circuit
    from circuitkit.runs.feature_run import FeatureRun
    from circuitkit.scores import Scores

WIDTH, MOST_ROWS, MOST_CELLS = 80, 40, 20  # of a table of components
UNDEFINED = "undefined: the clean and corrupt metrics are equal, so there is no behaviour to explain"


def circuit_table(circuit: Circuit, folder: Path | None) -> Table:
    """Everything about one run in one table; the last rows say where it lies."""
    assert circuit.result is not None
    meta = circuit.meta
    table = result_table(circuit.result, f"{meta['task']} in {meta['model']}, by {meta['method']}")
    _add(
        table,
        "seconds",
        ", ".join(f"{name} {seconds:.1f}" for name, seconds in meta.get("seconds", {}).items()),
    )
    top = zip(circuit.edge_names()[:5], circuit.score.tolist(), strict=False)
    _add(table, "strongest edges", "\n".join(f"{name}  {score:+.3g}" for name, score in top))
    if folder is not None:
        _add(table, "run folder", shown(folder))
        _add(table, "page to open", shown(folder / "circuit.html"))
    return table


def graph_table(run: FeatureRun, folder: Path) -> Table:
    """A feature graph, what it was measured to be worth, and the strongest direct effects on what it explains."""
    graph, kept, tested = run.graph, run.faithfulness, run.verification
    table = Table(
        title=Text(f"{run.meta['method']} in {graph.model}"), title_justify="left", show_header=False, box=None,
        padding=(0, 2, 0, 0),
    )  # fmt: skip
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    _add(table, "nodes", f"{len(graph):,} of {run.whole[0]:,}")
    _add(table, "edges", f"{graph.n_edges:,} of {run.whole[1]:,}")
    if run.meta["method"] == "attribution-graph":
        scores = f"replacement score {graph.replacement_score:.3f}, completeness score {graph.completeness_score:.3f}"
        _add(table, "by the graph", scores)
    elif not isinstance(run.found, FeatureGraph):
        _add(table, "found", str(run.found))
        _add(table, "strongest", "\n".join(run.strongest()))
    if kept is not None:
        random = kept.random_faithfulness
        beside = f"; random circuits {min(random):.3f} to {max(random):.3f}" if random else ""
        said = "undefined" if kept.faithfulness is None else f"{kept.faithfulness:.3f}{beside}"
        _add(table, "faithfulness", f"{said}  (latents outside set to zero, errors kept)")
        left = "undefined" if kept.completeness is None else f"{kept.completeness:.3f}"
        _add(table, "completeness", f"{left}  (what is left with the latents inside set to zero; 0 is best)")
        _add(table, "verdict", kept.verdict)
    if tested is not None:
        agreed = ", ".join(f"{m} {tested.edges.spearman(m):.2f} / {tested.edges.r_squared(m):.2f}" for m in MODES)
        _add(table, "edges ablated", f"Spearman / R2 of predicted and measured: {agreed}")
    _add(table, "seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.meta["seconds"].items()))
    for target, effects in strongest_effects(graph):
        _add(table, f"into {target}", "\n".join(f"{name}  {effect:+.3g}" for name, effect in effects))
    _add(table, "folder", shown(folder))
    _add(table, "page to open", shown(folder / "graph.html"))
    return table


def strongest_effects(
    graph: FeatureGraph, targets: int = 2, most: int = 5
) -> list[tuple[str, list[tuple[str, float]]]]:
    """The strongest direct effects on what weighs most among the graph's targets."""
    found = []
    rows = graph.targets.tolist()
    for number in graph.weights.argsort(descending=True).tolist()[:targets]:
        if graph.weights[number] <= 0 or number not in rows:
            continue
        row = graph.effects[rows.index(number)]
        order = row.abs().argsort(descending=True).tolist()[:most]
        effects = [(graph.label(i), float(row[i])) for i in order if row[i] != 0]
        found.append((graph.label(number), effects))
    return found


def result_table(result: Result, title: str) -> Table:
    """What a circuit was measured to do."""
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    _add(table, "edges", f"{result.n_edges:,} of {result.n_possible:,}")
    _add(table, "faithfulness", _with_interval(result.faithfulness, result.faithfulness_interval))
    if result.random_faithfulness is not None:
        _add(table, "random circuits", _with_interval(result.random_faithfulness, result.random_interval))
    _add(table, "verdict", result.verdict)
    measured = f"clean {result.clean:.3f}, corrupt {result.corrupt:.3f}, circuit {result.circuit:.3f}"
    _add(table, result.metric, measured)
    _add(table, "pairs", f"{result.n_examples:,}; removed edges carry their {result.corrupt_value} value")
    if result.cpr is not None and result.cmd is not None:
        _add(table, "over all sizes", f"CPR {result.cpr:.3f}, CMD {result.cmd:.3f}")
    if result.known is not None:
        _add(
            table,
            "known circuit",
            ", ".join(f"{name} {value:.3f}" for name, value in result.known.items() if value is not None),
        )
    return table


def score_table(scores: Scores | NodeScores, most: int = 10) -> Table:
    """The strongest edges of a ranking, connected or not; of scores of components, all that can be read."""
    if isinstance(scores, NodeScores):
        return _node_table(scores)
    title = f"strongest edges by {scores.method}"
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0), min_width=len(title))
    for heading in ("edge", "score", "standard error"):
        table.add_column(heading, justify="left" if heading == "edge" else "right")
    for row in scores.to_pandas().head(most).itertuples():
        error = "" if row.stderr != row.stderr else f"{row.stderr:.3g}"
        table.add_row(Text(f"{row.source}->{row.destination}"), f"{row.score:+.4g}", error)
    return table


def _node_table(scores: NodeScores) -> Table:
    """All effects, on their side if that fits better; of more than fit either way the strongest, one on each line."""
    title, what = f"{scores.method}: effect on the metric", list[list[str]]()
    # NaN stands where there is no such component, or no edge to patch.
    cells = [["" if value != value else f"{value:+.3g}" for value in row] for row in scores.values.tolist()]
    lines = [["", *scores.columns], *([label, *row] for label, row in zip(scores.rows, cells, strict=True))]
    for way in (lines, [list(column) for column in zip(*lines, strict=True)]):
        if _width(way) <= WIDTH and (way is lines or len(way) <= MOST_ROWS):
            what = way
            break
    else:
        title += f", the {MOST_CELLS} strongest of {scores.values.numel():,}"
        order = scores.values.abs().nan_to_num(-1).flatten().argsort(descending=True, stable=True)[:MOST_CELLS]
        at = [divmod(int(i), len(scores.columns)) for i in order]
        what = [["component", "where", "effect"], *([scores.rows[i], scores.columns[k], cells[i][k]] for i, k in at)]
    table = Table(title=Text(title), title_justify="left", box=None, min_width=len(title))
    for heading in what[0]:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for line in what[1:]:
        table.add_row(*map(Text, line))
    return table


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Characters that a table takes, with a space on either side of every cell."""
    return sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True))


def names_table(rows: Sequence[tuple[str, ...]], headings: tuple[str, ...]) -> Table:
    """Names with one line on each."""
    table = Table(*headings, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns[:-1]:
        column.no_wrap = True  # a name is typed as it is read
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def shown(path: Path) -> str:
    """A path as short as it can be written from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _add(table: Table, label: str, text: str) -> None:
    # As Text: a name in square brackets is not markup.
    table.add_row(Text(label), Text(text))


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:.3f}" + ("" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]")
