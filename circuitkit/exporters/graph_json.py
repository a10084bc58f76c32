"""Attribution graphs as the JSON that Neuronpedia's and circuit-tracer's viewers load.

Written so that none of these readers stumbles: a logit's label holds its probability as ``(p=0.123)``, which is parsed
without a guard; rows are numbered from 1 where the highest would be 0, which is taken for "no layer"; every node has a
``jsNodeId`` of its own; errors are named so that no feature of layer 0 shares their id; at most 200 nodes are pinned;
names made of several dictionaries are the same in every process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuitkit.atomic import write_atomic
from circuitkit.errors import FormatError, OptionError
from circuitkit.exporters.graph_json_draft import Draft, View
from circuitkit.exporters.graph_json_schema import check_graph_json, text_of
from circuitkit.features.graph import FeatureGraph
from circuitkit.functional.text import visible
from circuitkit.schema import parse_json, schema_name, to_json


def write_graph_json(
    graph: FeatureGraph,
    path: str | Path,
    *,
    slug: str,
    scan: str | Sequence[str],
    prompt: str | None = None,
    prompt_tokens: Sequence[str] | None = None,
    target_tokens: Mapping[int, str] | None = None,
    view: View | None = None,
    node_threshold: float | None = None,
    source_set: str | None = None,
) -> Path:
    """Write an attribution graph for Neuronpedia, circuit-tracer and `read_graph_json`, in one step.

    ``influence`` of a node is the share of all influence carried by the nodes down to it, largest first: a viewer's
    slider at 0.8 hides the nodes beyond. Where a layer has features of attention, MLP or stream side by
    side, each gets a row: rows count ``layer * parts + part``, and ids follow rows.

    Args:
        graph: what to write; every edge of it becomes a link.
        path: the file.
        slug: name of the graph, of letters, digits, ``.``, ``_`` and ``-``.
        scan: what viewers know the model by, such as ``gemma-2-2b``; or names of dictionaries, to be made a name of.
        prompt: as text; the graph's own if None.
        prompt_tokens: the text of each token, the graph's own if None; characters that files cannot hold are made
            visible, as in labels.
        target_tokens: the text of each token id that is explained, the graph's own if None; ids stand for those that
            are missing.
        view: pins, groups and labels.
        node_threshold: where viewers' slider starts; everything is shown if None.
        source_set: Neuronpedia's name of the dictionaries, where it has pages of their features.

    Raises:
        OptionError: if the slug, tokens, pins or threshold do not fit.
        FormatError: if a number is not finite, two nodes would share an id, or the file cannot be written.
    """
    draft, content = draft_of(
        graph, slug=slug, scan=scan, prompt=prompt, prompt_tokens=prompt_tokens, target_tokens=target_tokens,
        view=view, node_threshold=node_threshold, source_set=source_set,
    )  # fmt: skip
    if not draft.inner:
        raise FormatError("the graph has tokens and targets only, and viewers refuse that; keep more when pruning")
    return write_atomic(path, to_json({**content, "links": list(draft.links())}))


def draft_of(
    graph: FeatureGraph,
    *,
    slug: str,
    scan: str | Sequence[str],
    prompt: str | None = None,
    prompt_tokens: Sequence[str] | None = None,
    target_tokens: Mapping[int, str] | None = None,
    view: View | None = None,
    node_threshold: float | None = None,
    source_set: str | None = None,
) -> tuple[Draft, dict[str, Any]]:
    """What `write_graph_json` writes, all but the links, which the draft has; arguments and errors are the same."""
    if not re.fullmatch(r"\w[\w.-]*", slug, re.ASCII):
        raise OptionError(f"got slug {slug[:80]!r}, expected letters, digits, '.', '_' and '-' only: it names a file")
    if prompt_tokens is None:
        prompt_tokens = graph.texts or tuple(str(i) for i in range(len(graph.tokens)))
    prompt = "".join(graph.texts) if prompt is None else prompt
    if len(prompt_tokens) != len(graph.tokens):
        raise OptionError(f"got {len(prompt_tokens)} texts of tokens for a graph of {len(graph.tokens)} tokens")
    if node_threshold is not None and not 0 < node_threshold <= 1:
        raise OptionError(f"got node_threshold = {node_threshold}, expected a share above 0 and at most 1, or None")
    said = dict(graph.target_tokens if target_tokens is None else target_tokens)
    draft = Draft(graph, tuple(visible(text) for text in prompt_tokens), said, view or View())
    metadata = {
        "slug": slug,
        **_scan(scan),
        "prompt_tokens": list(draft.tokens) or ["any"],  # viewers want one
        "prompt": "".join(c if c in "\n\t" else visible(c) for c in prompt),
        "schema_version": 1,
        "info": {"generator": {"name": "circuitkit"}},
        **({} if node_threshold is None else {"node_threshold": float(node_threshold)}),
        **({} if source_set is None else {"feature_details": {"neuronpedia_source_set": source_set}}),
        "circuitkit": {
            "schema": schema_name("feature-graph"),
            "model": graph.model,
            "tokens": graph.tokens.tolist(),
            "texts": [visible(text) for text in graph.texts],
            "target_tokens": {str(i): visible(text) for i, text in graph.target_tokens.items()},
            "dtype": str(graph.effects.dtype).removeprefix("torch."),
        },
    }
    return draft, {"metadata": metadata, "qParams": draft.view_state(), "nodes": draft.rows}


def write_graph_index(folder: str | Path) -> Path:
    """Write ``graph-metadata.json``, by which circuit-tracer's server finds the graph files of a folder.

    That server wants each graph in a file named by its slug.

    Raises:
        FormatError: if the folder has JSON that is not a graph, a file with another name, or cannot be written to.
    """
    target, found = Path(folder) / "graph-metadata.json", []
    for path in sorted(Path(folder).glob("*.json")):
        if path == target:
            continue
        data = parse_json(text_of(path), str(path))
        slug = check_graph_json(data, str(path)).metadata.slug
        if path.stem != slug:
            raise FormatError(f"{path} holds the graph {slug[:80]!r}; name the file by its slug")
        found.append({key: value for key, value in data["metadata"].items() if key != "circuitkit"})
    return write_atomic(target, to_json({"graphs": found}))


def stable_scan(dictionaries: Sequence[str]) -> str:
    """A name for several dictionaries, the same in every process.

    >>> stable_scan(["a", "b"])
    'custom-7e18f737311b'
    """
    return "custom-" + hashlib.sha256("\n".join(dictionaries).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _scan(scan: str | Sequence[str]) -> dict[str, Any]:
    several = [] if isinstance(scan, str) else list(scan)
    name = scan if isinstance(scan, str) else stable_scan(several)
    if not name or not (several or isinstance(scan, str)):
        raise OptionError("got no scan, expected the model's name in viewers, or names of dictionaries")
    return {"scan": name, "transcoder_list": several}
