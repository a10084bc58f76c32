"""A feature graph as one self-contained page: tokens across, layers upward, pins, groups and names that can be saved.

What is saved is the graph file of `circuitkit.exporters.graph_json`, with the page's state in ``qParams``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitkit.atomic import write_atomic
from circuitkit.drawing import PALETTE
from circuitkit.errors import FormatError, OptionError
from circuitkit.exporters.graph_json import draft_of
from circuitkit.exporters.graph_json_draft import Draft, View, base
from circuitkit.features.contrast import contrasted
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.functional.text import visible
from circuitkit.viewer.document import filled, inert_json, source_hash, text_of
from circuitkit.viewer.feature_layout import FINALS, layout, part_name

if TYPE_CHECKING:
    from circuitkit.exporters.graph_json_read import GraphFile
    from circuitkit.features.dashboards import Dashboard

MOST_EDGES = 100_000  # in one page
MANY_NODES = 400  # beyond which the page opens with the nodes of most influence
SCRIPTS = ("feature_state.js", "feature_panel.js", "feature_page.js")
KIND_NAMES = {
    "latent": "latent", "unit": "unit", "error": "error", "bias": "bias", "token": "token", "position": "position",
    "logit": "logit", "direction": "direction", "score": "attention score",
}  # fmt: skip


def write_feature_page(graph: FeatureGraph, path: str | Path, **options: Any) -> Path:
    """Write `feature_page` as one HTML file that opens in any browser without a network; returns its path.

    Raises:
        OptionError, FormatError: as `feature_page`, and if the file cannot be written.
    """
    return write_atomic(path, feature_page(graph, **options))


def feature_page(
    graph: FeatureGraph,
    *,
    texts: Sequence[str] | None = None,
    target_tokens: Mapping[int, str] | None = None,
    view: View | None = None,
    dashboards: Iterable[Dashboard] = (),
    title: str = "",
    slug: str = "graph",
    node_threshold: float | None = None,
) -> str:
    """The text of a page that draws a feature graph, edges of what is selected or pinned, and dashboards.

    Args:
        graph: what is drawn; of its edges at most 100,000, for every target those of largest magnitude.
        texts: of each token; the graph's own, or ids if it has none, if None.
        target_tokens: of the token ids that are explained, the graph's own if None; ids stand for missing ones.
        view: pins, groups and names to begin with.
        dashboards: of latents, for the panel of those that are in the graph.
        title: heading; the prompt, or how many were merged, if empty.
        slug: name of the file that the page saves.
        node_threshold: share of influence that the nodes carry which are shown first; all where there are few.

    Raises:
        OptionError: if texts, view or threshold do not fit the graph.
        FormatError: if a number is not finite, or two nodes have one name.

    >>> import torch
    >>> from circuitkit.features.graph import FeatureNode
    >>> nodes = (FeatureNode("input@0", "token", -1, "resid-pre.0", 0, 5, 1.0, 0),
    ...          FeatureNode("logits.7@0", "logit", 1, "resid-pre.1", 0, 7, 0.9, 1))
    >>> graph = FeatureGraph(nodes, torch.tensor([1]), torch.tensor([[2.0, 0.0]]), torch.tensor([2.0]),
    ...                      torch.tensor([0.0, 1.0]), torch.tensor([5]), "toy")
    >>> feature_page(graph, texts=["hello"]).startswith("<!DOCTYPE html>")
    True
    """
    texts = texts if texts is not None else graph.texts or None
    tokens = list(texts) if texts is not None else _ids(graph)
    if node_threshold is None and len(graph) > MANY_NODES:
        node_threshold = 0.8
    draft, content = draft_of(
        graph, slug=slug, scan=graph.model or "unknown", prompt="" if texts is None else "".join(tokens),
        prompt_tokens=tokens, target_tokens=target_tokens, view=view, node_threshold=node_threshold,
    )  # fmt: skip
    data = _data(draft, content, texts is not None, _needed(graph, dashboards), title)
    parts = {
        "policy": _policy(),
        "title": html.escape(data["title"]),
        "style": text_of("feature_page.css"),
        "data": inert_json(data),
        **{name.removesuffix(".js"): text_of(name) for name in SCRIPTS},
    }
    return filled(text_of("feature_page.html"), parts)


def page_of_file(file: GraphFile, *, dashboards: Iterable[Dashboard] = ()) -> str:
    """The page of a graph file, of circuitkit or another tool, with the view that was saved in it."""
    # Files have a text for every token: where there was none, its id or its number.
    tokens = list(file.prompt_tokens)
    made_up = tokens in (_ids(file.graph), [str(i) for i in range(len(tokens))])
    return feature_page(
        file.graph, texts=None if made_up else tokens, view=file.view, dashboards=dashboards,
        slug=re.sub(r"[^\w.-]+", "-", file.slug, flags=re.ASCII).strip("-.") or "graph",
        node_threshold=file.node_threshold,
    )  # fmt: skip


def _data(
    draft: Draft, content: dict[str, Any], has_texts: bool, boards: dict[tuple[str, int], Dashboard], title: str
) -> dict[str, Any]:
    """What the page's scripts read."""
    graph = draft.graph
    places = layout(graph, graph.influence.tolist())
    edges = _edges(graph)
    numbers = {key: i for i, key in enumerate(boards)}
    across = "step" if any(node.site.startswith("state") for node in graph.nodes) else "position"
    return {
        "title": visible(title) or _title(draft, has_texts, across) or "feature graph",
        "model": visible(graph.model),
        "facts": _facts(graph, edges),
        "across": across,
        "tokens": list(draft.tokens),
        "texts": has_texts,
        "merged": graph.counts is not None,
        "columns": [
            (f"any {across}" if p is None else draft.tokens[p] if p < len(draft.tokens) else str(p), p, x, w)
            for p, x, w in places.columns
        ],
        "rows": [(label, y, height) for label, y, height in places.rows],
        "nodes": {
            "label": [_label(draft, node) for node in graph.nodes],
            "kind": [node.kind for node in graph.nodes],
            "x": [round(x, 3) for x in places.x],
            "y": [round(y, 3) for y in places.y],
            "column": places.column,
            "row": places.row,
            "part": [part_name(node) for node in graph.nodes],
            "share": [round(share, 5) for share in draft.shares],
            "influence": [float(f"{value:.4g}") for value in graph.influence.tolist()],
            "count": None if graph.counts is None else graph.counts.tolist(),
            "board": [numbers.get((node.site, node.index or 0)) for node in graph.nodes],
        },
        "edges": edges,
        "boards": [_board(board) for board in boards.values()],
        "file": _file(draft, content),
        "threshold": content["metadata"].get("node_threshold", 1.0),
        "kinds": KIND_NAMES,
        "finals": FINALS,
        "colours": {key: PALETTE[key] for key in ("positive", "negative", "text", "muted", "rule")},
    }


def _ids(graph: FeatureGraph) -> list[str]:
    return [str(token) for token in graph.tokens.tolist()]


def _title(draft: Draft, has_texts: bool, across: str) -> str:
    counts = draft.graph.counts
    if counts is not None:
        n = int(counts.max()) if len(counts) else 0
        return f"merged from {n:,} prompt{'' if n == 1 else 's'}"
    # Networks that read numbers have steps for tokens, and these say nothing about the prompt.
    numbers = not has_texts and across == "step" and list(draft.tokens) == [str(i) for i in range(len(draft.tokens))]
    return "" if numbers else ("" if has_texts else " ").join(draft.tokens).strip()


def _facts(graph: FeatureGraph, edges: dict[str, Any]) -> list[tuple[str, str, str]]:
    left = edges["left_out"]
    detail = f"the {left:,} weakest edges, by their share of what a node gets, are not in this page" if left else ""
    facts = [("nodes", f"{len(graph):,}", ""), ("edges", f"{graph.n_edges - left:,}", detail)]
    # They say how much of a graph latents stand for; a search's paths and one attention score never stand for all.
    partial = any(n.kind == "score" or n.name.startswith(("pruned.", "error.")) for n in graph.nodes)
    scores = () if partial else (("replacement", graph.replacement_score), ("completeness", graph.completeness_score))
    return facts + [(f"{name} score", f"{score:.2f}", "") for name, score in scores if score == score]


def _label(draft: Draft, node: FeatureNode) -> str:
    """What a node is called until it is renamed."""
    stem = base(node)
    token = draft.token(node)
    if node.kind == "logit" and node.index is not None:
        return f"“{visible(draft.targets.get(node.index, str(node.index)))}”"
    ids = contrasted(stem) if node.kind == "direction" else None
    if ids is not None and all(i in draft.targets for i in ids):
        return " - ".join(f"“{visible(draft.targets[i])}”" for i in ids)
    if node.kind == "token" and stem in ("input", f"input.{node.index}") and token:
        return f"“{token}”"
    return visible(stem)


def _edges(graph: FeatureGraph) -> dict[str, Any]:
    """Edges row by row, and of each row its node, its total and the sum of all magnitudes; the largest if many."""
    effects = graph.effects.detach().cpu()
    if not bool(effects.isfinite().all()):
        raise FormatError("an effect is not finite, and a page has no number for it; attribute again")
    magnitudes = effects.abs()
    sums = magnitudes.double().sum(1)
    keep = effects != 0
    n = int(keep.sum())
    if n > MOST_EDGES:
        # As many for every target as fit, the rest of them unsplit.
        per_row = keep.sum(1)
        low, high = 0, int(per_row.max())
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(per_row.clamp(max=middle).sum()) <= MOST_EDGES else (low, middle)
        if low < 1:
            raise OptionError(f"got a graph with {n:,} edges into {len(effects):,} nodes; prune it before it is drawn")
        kept = magnitudes.topk(min(low, magnitudes.shape[1]), 1).indices
        keep &= keep.new_zeros(keep.shape).scatter(1, kept, True)
    rows, columns = keep.nonzero(as_tuple=True)
    weights = effects[rows, columns].numpy()
    # Texts of float32 are the shortest that come back the same.
    exact = [float(text) for text in weights.astype(str)] if weights.dtype == np.float32 else weights.tolist()
    return {
        "target": graph.targets.tolist(),
        "count": keep.sum(1).tolist(),
        "source": columns.tolist(),
        "weight": exact,
        "total": [float(f"{x:.6g}") for x in graph.totals.tolist()],
        "sum": [float(f"{x:.6g}") for x in sums.tolist()],
        "left_out": n - len(weights),
    }


def _file(draft: Draft, content: dict[str, Any]) -> dict[str, Any]:
    """The graph file without links and without names that were given, its nodes as columns."""
    plain = Draft(draft.graph, draft.tokens, draft.targets, View()).rows
    fields = [key for key in plain[0] if key != "circuitkit"] if plain else []
    given = [draft.view.labels.get(node.name) for node in draft.graph.nodes]
    own = list(dict.fromkeys(key for row in plain for key in row["circuitkit"]))
    return {
        "metadata": content["metadata"],
        "state": content["qParams"],
        "names": [None if name is None else visible(name) for name in given],
        "fields": fields,
        "values": [[row[key] for row in plain] for key in fields],
        "own_fields": own,
        "own_values": [[row["circuitkit"].get(key) for row in plain] for key in own],
    }


def _needed(graph: FeatureGraph, boards: Iterable[Dashboard]) -> dict[tuple[str, int], Dashboard]:
    wanted = {(node.site, node.index) for node in graph.nodes if node.kind == "latent"}
    return {(board.site, board.latent): board for board in boards if (board.site, board.latent) in wanted}


def _board(board: Dashboard) -> dict[str, Any]:
    """A dashboard as the panel shows it."""

    def examples(found: Sequence[Any]) -> list[Any]:
        return [[[visible(t) for t in e.texts], [float(f"{a:.3g}") for a in e.activations], e.at] for e in found]

    def tokens(found: Sequence[tuple[str, float]]) -> list[Any]:
        return [[visible(text), float(f"{value:.3g}")] for text, value in found]

    return {
        "frequency": board.activation_frequency,
        "max": board.act_max,
        "top": examples(board.top),
        "intervals": [[name, examples(found[:3])] for name, found in board.intervals],
        "counts": board.histogram.counts,
        "edges": [float(f"{edge:.4g}") for edge in board.histogram.edges],
        "top_logits": tokens(board.top_logits),
        "bottom_logits": tokens(board.bottom_logits),
    }


def _policy() -> str:
    """Only the scripts and styles of this page run, known by their hashes; nothing is ever fetched."""
    scripts = " ".join(source_hash(text_of(name)) for name in SCRIPTS)
    return (
        f"default-src 'none'; script-src {scripts}; style-src {source_hash(text_of('feature_page.css'))}; "
        "style-src-attr 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
