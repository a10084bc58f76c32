"""A circuit as one self-contained page: no network, no server, nothing that a label could run."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path
from typing import Any

from circuitkit.atomic import write_atomic
from circuitkit.circuit import Circuit
from circuitkit.drawing import KIND_NAMES, PALETTE, Drawing, draw, effect_names, inner_name, visible
from circuitkit.viewer.document import filled, inert_json, source_hash, text_of

FIRST_EDGES = 2000


def write_page(circuit: Circuit, path: str | Path) -> Path:
    """Write the circuit as one HTML file that opens in any browser without a network; returns its path.

    Raises:
        FormatError: if the file cannot be written.
    """
    return write_atomic(path, page(circuit))


def embed(circuit: Circuit, *, height: int = 640) -> str:
    """The page inside a sandboxed frame, for a notebook's output cell; it survives conversion to HTML."""
    return (
        f'<iframe srcdoc="{html.escape(page(circuit), quote=True)}" sandbox="allow-scripts" loading="lazy" '
        f'title="circuit" style="width:100%;height:{height}px;border:1px solid #e4e7ec;border-radius:8px"></iframe>'
    )


def page(circuit: Circuit) -> str:
    """The text of the page.

    >>> from circuitkit.graph import chain_graph
    >>> text = page(Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"]))
    >>> text.startswith("<!DOCTYPE html>"), "src=" in text.split("<script")[0]
    (True, False)
    """
    data = page_data(circuit)
    parts = {
        "policy": _policy(),
        "title": html.escape(f"circuit: {data['title']}"),
        "style": text_of("page.css"),
        "data": inert_json(data),
        "library": _library(),
        "script": text_of("page.js"),
    }
    return filled(text_of("page.html"), parts)


def page_data(circuit: Circuit) -> dict[str, Any]:
    """What the page's script reads: boxes and edges as columns, strongest first, and the texts around them."""
    drawing = draw(circuit)
    readers = {name: i for i, name in enumerate(dict.fromkeys(curve.reader for curve in drawing.curves))}
    slots = {node.name: node.slot for node in circuit.graph.destination_nodes}
    said = {key: visible(str(circuit.meta[key])) for key in ("task", "method", "model") if circuit.meta.get(key)}
    return {
        "title": said.get("task") or (visible(circuit.result.task) if circuit.result else "circuit"),
        "subtitle": " · ".join(said[key] for key in ("method", "model") if key in said),
        "facts": _facts(circuit),
        "example": _example(circuit),
        "boxes": [
            {"name": visible(b.name), "label": visible(b.label), "kind": b.kind, "x": round(b.x, 4), "y": b.y}
            for b in drawing.boxes
        ],
        "places": [_place(box.layer, box.kind) for box in drawing.boxes],
        "layers": _layers(drawing),
        "spans": [(visible(text), round(across, 4)) for text, across in drawing.spans],
        "inner": [list(pair) for pair in drawing.inner],
        "inner_name": inner_name(drawing),
        "readers": [visible(name) for name in readers],
        "slots": [f" (as {visible(slot)})" if (slot := slots[c.reader]) else "" for c in drawing.curves],
        "edges": {
            "source": [curve.source for curve in drawing.curves],
            "target": [curve.target for curve in drawing.curves],
            "reader": [readers[curve.reader] for curve in drawing.curves],
            "score": [curve.score for curve in drawing.curves],
            "stderr": [curve.stderr for curve in drawing.curves],
            "bend": [[round(part, 3) for part in curve.bend] for curve in drawing.curves],
        },
        "colours": PALETTE,
        "effects": effect_names(circuit),
        "kinds": KIND_NAMES,
        "first": FIRST_EDGES,
    }


def _facts(circuit: Circuit) -> list[tuple[str, str, str]]:
    """What is known of the circuit as (name, value, detail)."""
    facts = [("edges", f"{len(circuit):,}", f"of {circuit.graph.n_edges:,}")]
    result = circuit.result
    if result is None:
        return facts
    if result.faithfulness is None:
        facts.append(("faithfulness", "undefined", ""))
    else:
        facts.append(("faithfulness", f"{result.faithfulness:z.2f}", _interval(result.faithfulness_interval)))
    if result.random_faithfulness is not None:
        facts.append(("random circuits", f"{result.random_faithfulness:z.2f}", _interval(result.random_interval)))
    ends = f"clean {result.clean:z.2f}, corrupt {result.corrupt:z.2f}"
    facts.append((visible(result.metric), f"{result.circuit:z.2f}", ends))
    return facts


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else "[{:z.2f}, {:z.2f}]".format(*interval)


def _example(circuit: Circuit) -> list[tuple[str, str]]:
    example = circuit.meta.get("example")
    if not isinstance(example, dict):
        return []
    names = [name for name in ("clean", "corrupt", "right", "wrong", "target") if example.get(name)]
    return [(name, visible(_sentence(example[name]))) for name in names]


def _sentence(tokens: Any) -> str:
    return " ".join(map(str, tokens)) if isinstance(tokens, list | tuple) else str(tokens)


def _place(layer: int, kind: str) -> str:
    return "" if kind in ("input", "logits") else f", layer {layer}"


def _layers(drawing: Drawing) -> list[tuple[str, float, list[int]]]:
    """Label, height and boxes of each layer."""
    numbers = sorted({box.layer for box in drawing.boxes})
    members = [[i for i, box in enumerate(drawing.boxes) if box.layer == layer] for layer in numbers]
    return [(text, height, boxes) for (text, height), boxes in zip(drawing.layers, members, strict=True)]


def _policy() -> str:
    """Only the three scripts and styles of this page run, known by their hashes; nothing is ever fetched."""
    scripts = " ".join(source_hash(text) for text in (_library(), text_of("page.js")))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {source_hash(text_of('page.css'))}; "
        "style-src-attr 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@cache
def _library() -> str:
    # Its licence notes name two addresses; without the scheme the page holds nothing that looks like a reference.
    return text_of("vendor/cytoscape.min.js").replace("http://", "")
