"""What a person reads at the end of a run: small rich tables made from a circuit, never printed here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from circuitkit.result import NodeScores, Result

if TYPE_CHECKING:
    from circuitkit.circuit import Circuit
    from circuitkit.scores import Scores

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
    """The strongest edges of a ranking, connected or not; of scores of components, all."""
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
    title = f"{scores.method}: effect on the metric"
    table = Table(title=Text(title), title_justify="left", box=None, min_width=len(title))
    for heading in ("", *scores.columns):
        table.add_column(Text(str(heading)), justify="right")
    for label, row in zip(scores.rows, scores.values.tolist(), strict=True):
        # NaN stands where there is no such component, or no edge to patch.
        table.add_row(Text(label), *("" if value != value else f"{value:+.3g}" for value in row))
    return table


def names_table(rows: list[tuple[str, str]], headings: tuple[str, str]) -> Table:
    """Names with one line on each."""
    table = Table(*headings, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name, line in rows:
        table.add_row(Text(name), Text(line))
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
