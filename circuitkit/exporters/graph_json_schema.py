"""What a graph file of Neuronpedia and circuit-tracer must hold: the published schema's rules, and its viewers'.

Unknown fields are kept apart, as the schema allows them. Feature ids pair layer and index (Cantor):

    id = (layer + index) (layer + index + 1) / 2 + index
"""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from circuitkit.errors import FormatError

MOST_PINNED = 200  # viewers draw no more
LATENTS = ("cross layer transcoder", "lorsa")
ERRORS = ("mlp reconstruction error", "lorsa error")

_Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]  # what JavaScript's numbers hold
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Open(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Metadata(_Open):
    """The prompt and where it came from."""

    slug: str
    scan: str
    prompt_tokens: list[str]
    prompt: str
    schema_version: int | None = None
    node_threshold: _Finite | None = None
    circuitkit: dict[str, Any] | None = None


class QParams(_Open):
    """What a reader did to the picture."""

    pinnedIds: list[str] = []
    supernodes: list[list[str]] = []
    clerps: list[list[str]] = []
    clickedId: str | None = None
    sg_pos: str | None = None


class Own(_Open):
    """What a `FeatureNode` has and the schema has no field for."""

    name: str
    kind: str
    layer: _Whole
    site: str
    index: _Whole | None
    value: _Finite
    stage: _Whole
    row: _Whole | None = None
    total: _Finite | None = None
    label: str | None = None
    anywhere: bool = False
    count: _Whole | None = None


class Node(_Open):
    """One circle, square or diamond."""

    node_id: str
    feature: _Whole | None
    layer: str | _Whole
    ctx_idx: _Whole
    feature_type: str
    jsNodeId: str
    clerp: str
    influence: _Finite | None = None
    activation: _Finite | None = None
    token_prob: _Finite | None = None
    circuitkit: Own | None = None

    @property
    def feature_id(self) -> str:
        """Under which viewers keep a label."""
        return f"{self.layer}_{self.feature}_{self.ctx_idx}"


class Link(_Open):
    """One direct effect."""

    source: str
    target: str
    weight: _Finite


class GraphJson(_Open):
    """A whole file."""

    metadata: Metadata
    qParams: QParams
    nodes: list[Node]
    links: list[Link]


def check_graph_json(data: Any, where: str = "the data") -> GraphJson:
    """The parts of a graph file, checked: types, required fields, positions within the prompt, unique ids, known ends.

    Raises:
        FormatError: naming the first field, node or link that breaks a rule.

    >>> check_graph_json({"nodes": []})
    Traceback (most recent call last):
    ...
    circuitkit.errors.FormatError: the data is not an attribution graph: metadata: Field required; give a graph file...
    """
    try:
        file = GraphJson.model_validate(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "top level"
        raise FormatError(
            f"{where} is not an attribution graph: {place}: {problem['msg']}; "
            "give a graph file of Neuronpedia, circuit-tracer or circuitkit"
        ) from error
    n, known = len(file.metadata.prompt_tokens), set[str]()
    for node in file.nodes:
        if node.node_id in known:
            raise FormatError(
                f"{where} has the node id {node.node_id[:80]!r} twice, so its links are ambiguous (older "
                "circuit-tracers name errors like features of layer 0); write the graph again with a newer version"
            )
        if not 0 <= node.ctx_idx < n:
            raise FormatError(
                f"{where}: node {node.node_id[:80]!r} is at position {node.ctx_idx}, expected 0 to {n - 1}"
            )
        known.add(node.node_id)
    _check_links(file.links, known, where)
    return file


def _check_links(links: list[Link], known: set[str], where: str) -> None:
    seen = set[tuple[str, str]]()
    for link in links:
        if lost := {link.source, link.target} - known:
            raise FormatError(f"{where} has a link with {min(lost)[:80]!r}, which is none of its nodes; write it again")
        if (link.source, link.target) in seen:
            raise FormatError(f"{where} has the link {link.source[:80]} -> {link.target[:80]} twice; keep one of them")
        seen.add((link.source, link.target))


def text_of(path: str | Path) -> str:
    """What a file says. Raises FormatError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"could not read {path}: {error}; give a graph file") from error


def paired(layer: int, index: int) -> int:
    """One number for a layer and an index.

    >>> paired(3, 17), unpaired(227)
    (227, (3, 17))
    """
    return (layer + index) * (layer + index + 1) // 2 + index


def unpaired(feature: int) -> tuple[int, int]:
    """Layer and index of a number that `paired` made."""
    diagonal = (isqrt(8 * feature + 1) - 1) // 2
    index = feature - diagonal * (diagonal + 1) // 2
    return diagonal - index, index
