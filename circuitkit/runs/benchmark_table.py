"""The benchmark of methods as tables for people: rich, Markdown, and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from circuitkit.atomic import write_atomic
from circuitkit.evaluation.ground_truth import KNOWN_SIZE, RANDOM, SHARES, Cell
from circuitkit.evaluation.losses import losses
from circuitkit.figures.benchmark import methods_figure
from circuitkit.runs.benchmark import Benchmark

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIZES = (*(str(share) for share in SHARES), KNOWN_SIZE)
SIZE_HEADINGS = (*(f"{share} %" for share in SHARES), KNOWN_SIZE)
NO_REASON = "**none given yet**"


def write_tables(folder: str | Path, found: Benchmark) -> None:
    """``methods.md`` and ``methods.html`` in a folder."""
    write_atomic(Path(folder) / "methods.md", "\n".join(markdown(found)) + "\n")
    page = figure_of(found).to_html(include_plotlyjs=True, full_html=True)
    write_atomic(Path(folder) / "methods.html", page)


def markdown(found: Benchmark) -> list[str]:
    """One row per method, the losses with their reasons, and every cell."""
    headings, rows = overview(found)
    lines = [*_grid(headings, rows), "", *_losses(found), "", "<details><summary>Every method on every model</summary>"]
    return [*lines, "", *_grid(*every_cell(found)), "", "</details>"]


def overview_table(found: Benchmark) -> Table:
    """One row per method, for the terminal."""
    headings, rows = overview(found)
    about = found.about
    title = f"methods where the circuit is known: {about['n']} pairs, seed {about['seed']}"
    table = Table(title=Text(title), title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    return table


def overview(found: Benchmark) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, the best mean AUROC first.

    AUROC and faithfulness are means over the models where the method gave scores (and a size is at least one edge);
    seconds are of all models together, memory is the highest of all.
    """
    headings = ["method", "models", "AUROC", "lowest", *SIZE_HEADINGS, "s", "MB", "losses"]
    lost = losses(found.cells)
    rows = []
    for method in ranked_methods(found):
        cells = [cell for cell in found.cells if cell.method == method]
        sound = [cell for cell in cells if cell.refused is None]
        aurocs = [cell.auroc for cell in sound if cell.auroc is not None]
        sizes = [_number(_mean([cell.faithfulness.get(size) for cell in sound])) for size in SIZES]
        seconds = [cell.seconds for cell in sound if cell.seconds is not None]
        peaks = [cell.peak_bytes for cell in sound if cell.peak_bytes is not None]
        rows.append(
            [
                method,
                f"{len(sound)}/{len(cells)}",
                _number(_mean(aurocs)),
                _number(min(aurocs, default=None)),
                *sizes,
                _seconds(sum(seconds) if seconds else None),
                _megabytes(max(peaks, default=None)),
                "–" if method == RANDOM else str(sum(loss.method == method for loss in lost)),
            ]
        )
    return headings, rows


def every_cell(found: Benchmark) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: one per model and method, ``random`` first."""
    headings = ["model", "method", "AUROC", *SIZE_HEADINGS, "s", "MB", "remark"]
    rows = []
    for cell in found.cells:
        sizes = [_number(cell.faithfulness.get(size)) for size in SIZES]
        cost = [_seconds(cell.seconds), _megabytes(cell.peak_bytes)]
        rows.append([cell.model, cell.method, _number(cell.auroc), *sizes, *cost, _remark(cell)])
    return headings, rows


def figure_of(found: Benchmark) -> go.Figure:
    """AUROC by method and model; the negative control, which has none, is left out."""
    models = list(dict.fromkeys(cell.model for cell in found.cells if cell.auroc is not None))
    methods = [method for method in ranked_methods(found) if method != RANDOM]
    at = {(cell.method, cell.model): cell for cell in found.cells}
    seconds = [
        sum(cell.seconds for cell in found.cells if cell.method == method and cell.seconds is not None) or None
        for method in methods
    ]
    return methods_figure(methods, models, [[at[m, name].auroc for name in models] for m in methods], seconds)


def ranked_methods(found: Benchmark) -> list[str]:
    """Methods by mean AUROC, the best first; what has none comes last."""
    means = {
        method: _mean([cell.auroc for cell in found.cells if cell.method == method])
        for method in dict.fromkeys(cell.method for cell in found.cells)
    }
    return sorted(means, key=lambda method: -1.0 if (mean := means[method]) is None else mean, reverse=True)


def _losses(found: Benchmark) -> list[str]:
    lines = ["### Where a method loses to random", ""]
    rows = [[loss.method, loss.model, loss.what, loss.reason or NO_REASON] for loss in losses(found.cells)]
    return lines + (_grid(["method", "model", "what", "reason"], rows) if rows else ["Nowhere in this table."])


def _remark(cell: Cell) -> str:
    if cell.refused is not None:
        return cell.refused
    if cell.finds_a_circuit is not None:
        return "finds a circuit where there is none" if cell.finds_a_circuit else "no better than chance, as is right"
    return ""


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(value.replace("|", "\\|") for value in line) + " |" for line in lines]


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _shown(form: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else form(value)


_number = _shown(lambda value: f"{value:z.2f}")
_seconds = _shown(lambda value: f"{value:.2f}")
_megabytes = _shown(lambda value: f"{value / 1e6:.1f}")
