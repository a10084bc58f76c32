"""Faithfulness over circuit sizes, by the sizes and rules of MIB (Mueller et al. 2025, arXiv:2504.13151).

At each size the first k % of the ranking are taken and dangling edges pruned; areas are trapezoids over k:

    CPR = area under f, edges ranked by signed score         CMD = area of |1 - f|, edges ranked by magnitude

Both are dominated by large circuits (the whole model alone gives CPR 0.25), so an area over log10(k)
stands beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from circuitkit.functional import select
from circuitkit.functional.stats import trapezoid
from circuitkit.result import CurvePoint
from circuitkit.scores import Scores
from circuitkit.shapes import EdgeMask

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Size:
    """The circuit at one point of the curve: nominal share of edges, ranking, and the edges left after pruning."""

    fraction: float
    absolute: bool
    mask: EdgeMask


def curve_circuits(scores: Scores) -> list[Size]:
    """The circuits of both curves, signed first."""
    graph, out = scores.graph, []
    for absolute in (False, True):
        order = _order(scores, absolute=absolute or not scores.signed)
        for fraction in MIB_FRACTIONS:
            chosen = select.first_edges(order, int(fraction * graph.n_edges), graph.mask)
            out.append(Size(fraction, absolute, select.prune_dangling(chosen, graph.feeds)))
    return out


def _order(scores: Scores, *, absolute: bool) -> Tensor:
    """Edges from the best down; grown from the logits where scores of different readers cannot be compared."""
    graph = scores.graph
    if scores.comparable:
        return select.ranked_edges(scores.values, graph.mask, absolute=absolute)
    return select.grown_order(scores.values, graph.mask, graph.feeds, absolute=absolute)


def curve_points(sizes: list[Size], faithfulness: list[float | None]) -> tuple[CurvePoint, ...]:
    """What was measured at each size."""
    return tuple(
        CurvePoint(size.fraction, int(size.mask.count_nonzero()), f, size.absolute)
        for size, f in zip(sizes, faithfulness, strict=True)
    )


def areas(points: tuple[CurvePoint, ...]) -> dict[str, Any]:
    """CPR, CMD and the area over log10(k), each None unless every size was measured."""
    signed = [p for p in points if not p.absolute and p.faithfulness is not None]
    absolute = [p for p in points if p.absolute and p.faithfulness is not None]
    if len(signed) < len(MIB_FRACTIONS) or len(absolute) < len(MIB_FRACTIONS):
        return {"cpr": None, "cmd": None, "log_area": None}
    x = [p.fraction for p in signed]
    logs = [math.log10(v) for v in x]
    f = [float(p.faithfulness) for p in signed if p.faithfulness is not None]
    distance = [abs(1 - float(p.faithfulness)) for p in absolute if p.faithfulness is not None]
    return {
        "cpr": trapezoid(f, x),
        "cmd": trapezoid(distance, x),
        "log_area": trapezoid(f, logs) / (logs[-1] - logs[0]),
    }
