"""Nodes and windows of recurrent networks: as users type them, as graphs show them, and from a graph to a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from circuitkit.errors import GraphError, OptionError
from circuitkit.graph import Graph
from circuitkit.models.hooked import Model

Windows = tuple[tuple[int, int], ...]


def with_view(
    model: Model,
    time: str | Sequence[tuple[int, int]] | None = None,
    *,
    steps: int | None = None,
    group: str | None = None,
    read_at: Sequence[int] | None = None,
) -> Model:
    """A recurrent model with other nodes or windows; any model as it is if nothing is asked.

    Args:
        time: ``"collapsed"``, ``"expanded"``, or windows: ``"0-4,4-12"`` or ``[(0, 4), (4, 12)]``.
        steps: how long inputs are; needed for ``"expanded"``.
        group: what a node is: ``"unit"``, ``"gate"``, ``"layer"`` or ``"direction"``.
        read_at: steps at which answers are read; where time is cut, others get no edges to the logits.

    Raises:
        OptionError: for a model that is not recurrent, or windows that cannot be read.
        GraphError: if these do not fit the network.
    """
    asked = [name for name, value in (("time", time), ("steps", steps), ("group", group)) if value is not None]
    if not asked:
        return model
    check_recurrent(model, asked[0])
    time = read_time(time) if isinstance(time, str) else time
    time = "collapsed" if time is None else time
    # With time in one piece there is one read-out, whatever is read.
    read_at = None if time == "collapsed" else read_at
    viewed: Model = model.viewed(time, steps=steps, group=group or "unit", read_at=read_at)  # type: ignore[attr-defined]
    return viewed


def check_recurrent(model: Model, option: str) -> None:
    """Refuse to cut the time or group the units of a transformer. Raises OptionError saying what to do instead."""
    if model.family != "recurrent":
        raise OptionError(
            f"{option} is for recurrent networks, and {model.name} is a {model.family}; leave it out. For a graph with "
            "positions use method='peap', for one with single neurons neurons=1"
        )


def read_time(text: str) -> str | Windows:
    """Windows from text; ``collapsed`` and ``expanded`` stay what they are.

    Raises:
        OptionError: for anything else.

    >>> read_time("0-4,4-12"), read_time("expanded")
    (((0, 4), (4, 12)), 'expanded')
    """
    if text in ("collapsed", "expanded"):
        return text
    parts = [re.fullmatch(r"\s*(\d+)-(\d+)\s*", part) for part in text.split(",")]
    if not all(parts):
        raise OptionError(
            f"got time = {text!r}, expected collapsed, expanded, or windows by first step and last step + 1: 0-4,4-12"
        )
    return tuple((int(part[1]), int(part[2])) for part in parts if part is not None)


def windows_in(graph: Graph) -> Windows | None:
    """The windows of a recurrent graph, by first step and last step + 1; None if its time is collapsed."""
    spans = [span for span in dict.fromkeys(node.span for node in graph.source_nodes) if span is not None]
    ends = [span.partition("-") for span in spans]
    return tuple((int(first), int(last or first) + 1) for first, _, last in ends) or None


def group_in(graph: Graph) -> str:
    """What the nodes of a recurrent graph are: ``unit``, ``gate``, ``layer`` or ``direction``."""
    inner = [node for node in graph.source_nodes if node.kind != "input"]
    if any(node.kind == "layer" for node in inner):
        directions = {"forward", "backward"} & {node.name.partition("@")[0] for node in inner}
        return "direction" if directions else "layer"
    return "gate" if inner and all(node.index is None for node in inner if node.kind != "subspace") else "unit"


def view_in(graph: Graph) -> dict[str, Any]:
    """The view that a recurrent graph is of, as `with_view` takes it and files keep it; {} for a transformer's graph.

    >>> from circuitkit.graph import chain_graph
    >>> view_in(chain_graph(1))
    {}
    """
    if not graph.is_recurrent:
        return {}
    windows = windows_in(graph)
    if windows is None:
        return {"time": "collapsed", "steps": None, "group": group_in(graph)}
    single = all(b == a + 1 for a, b in windows)
    time = "expanded" if single else ",".join(f"{a}-{b}" for a, b in windows)
    return {"time": time, "steps": windows[-1][1], "group": group_in(graph)}


def viewed_like(model: Model, graph: Graph) -> Model:
    """The model in the view that a graph is of.

    Raises:
        GraphError: if the graph is not of this model, or has subspaces, whose directions no file holds.
    """
    if graph.same_as(model.graph):
        return model
    found = _rebuilt(model, graph)
    if found is None:
        raise GraphError(_mismatch(model, graph))
    return found


def check_view(model: Model, graph: Graph) -> None:
    """Refuse a graph that is not a recurrent model's as it is viewed. Raises GraphError that says what to make."""
    if graph.same_as(model.graph):
        return
    if _rebuilt(model, graph) is None:
        raise GraphError(_mismatch(model, graph))
    raise GraphError(
        f"this circuit is of another view of {model.name} than the one given; give model.{_call(graph)} instead"
    )


def _rebuilt(model: Model, graph: Graph) -> Model | None:
    """The model in the view of a graph, or None if there is no such view."""
    if model.family != "recurrent" or not graph.is_recurrent:
        return None
    group, windows = group_in(graph), windows_in(graph)
    for read_at in (None,) if windows is None else (None, _read_at(graph, windows)):
        try:
            viewed: Model = model.viewed(windows or "collapsed", group=group, read_at=read_at)  # type: ignore[attr-defined]
        except GraphError:
            return None
        if viewed.graph.same_as(graph):
            return viewed
    return None


def _read_at(graph: Graph, windows: Windows) -> list[int]:
    """First steps of the windows in which the logits read anything."""
    used = graph.mask.any(0).tolist()
    spans = {
        n.span for n, any_edge in zip(graph.destination_nodes, used, strict=True) if n.kind == "logits" and any_edge
    }
    names = list(dict.fromkeys(node.span for node in graph.source_nodes))
    return [first for name, (first, _) in zip(names, windows, strict=True) if name in spans]


def _call(graph: Graph) -> str:
    """The call that makes the view of a graph."""
    windows, group = windows_in(graph), group_in(graph)
    parts = []
    if windows is not None:
        single = all(b == a + 1 for a, b in windows)
        parts.append(f"time='expanded', steps={windows[-1][1]}" if single else f"time={list(windows)}")
        reads = _read_at(graph, windows)
        parts += [f"read_at={reads}"] if len(reads) < len(windows) else []
    parts += [f"group={group!r}"] if group != "unit" else []
    return f"viewed({', '.join(parts)})"


def _mismatch(model: Model, graph: Graph) -> str:
    if any(node.kind == "subspace" for node in graph.source_nodes):
        return (
            f"this circuit's graph has subspaces and is not that of {model.name} as given; make the view with the same "
            "directions, model.viewed(subspaces=...), and evaluate there"
        )
    return f"this circuit is not of {model.name}: its graph has other nodes; load the model it was found in"
