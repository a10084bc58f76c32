"""Circuits and results as JSON with a versioned schema, checked by pydantic when they come back in.

A file says what it is in ``"schema": "circuitkit.<kind>/<version>"``. Numbers are written so that they come back bit
for bit; numbers that are not finite become null, because NaN is not JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError, GraphError
from circuitkit.graph import Graph
from circuitkit.result import Result

_MEASURES = ("completeness", "minimality", "test", "stability", "overlap", "controls")
_FILES = ("circuit", "scores", "result", "learning", "dictionary", "training", "feature-graph")
VERSIONS = dict.fromkeys((*_FILES, *_MEASURES), 1)
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_REQUIRED_NUMBERS = ("clean", "corrupt", "circuit", "seconds")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Node(_Strict):
    name: str
    kind: str
    layer: int
    stage: int
    index: int | None = None
    slot: str | None = None
    span: str | None = None


class _Graph(_Strict):
    sources: list[_Node]
    destinations: list[_Node]
    mask: list[str]
    feeds: list[list[int]]


class _Edge(_Strict):
    source: str
    destination: str
    score: float | None
    stderr: float | None = None


class _CircuitFile(_Strict):
    meta: dict[str, Any]
    result: dict[str, Any] | None
    dtype: str
    has_stderr: bool
    edges: list[_Edge]
    graph: _Graph


def schema_name(kind: str) -> str:
    """What a file of this kind says that it is.

    >>> schema_name("circuit")
    'circuitkit.circuit/1'
    """
    return f"circuitkit.{kind}/{VERSIONS[kind]}"


def check_schema(found: object, kind: str, where: str) -> None:
    """Refuse a file of another kind, or of a version newer than this one.

    Raises:
        FormatError: saying which it is and what to do.
    """
    expected = schema_name(kind)
    if found == expected:
        return
    name, _, version = str(found).partition("/")
    if name == f"circuitkit.{kind}" and version.isdecimal() and int(version) > VERSIONS[kind]:
        raise FormatError(
            f"{where} was written by a newer circuitkit ({found}, this one reads {expected}); "
            "upgrade with: pip install -U circuitkit-discovery"
        )
    got = repr(found) if isinstance(found, str) else "no schema"
    raise FormatError(f"{where} is not a {kind} file: got {got[:80]}, expected {expected!r}; give the right file")


def parse_json(text: str, where: str) -> Any:
    """Parse JSON, refusing what other readers would take differently: duplicate keys, NaN and Infinity.

    Raises:
        FormatError: naming the place and the fix.
    """

    def no_constant(name: str) -> None:
        raise FormatError(f"{where} contains {name}, which is not JSON; write null instead")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            double = next(key for key in keys if keys.count(key) > 1)
            raise FormatError(f"{where} has the key {double[:80]!r} twice in one object; keep one of them")
        return found

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{where} is truncated or not JSON (line {error.lineno}: {error.msg}); write it again from its source"
        ) from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where} has values nested too deep or too long to be ours ({error})") from error


def jsonable(value: Any) -> Any:
    """Plain JSON data for any value: not-finite numbers become null, unknown types their text.

    >>> jsonable({"n": (1, float("nan")), 2: None})
    {'n': [1, None], '2': None}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):  # tensors and numpy numbers
        return jsonable(value.tolist())
    return str(value)


def to_json(data: Mapping[str, Any]) -> str:
    """JSON text with one line per entry of the lists and objects at the top, so that two files can be compared."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in data.items()) + "\n}\n"


def circuit_to_json(circuit: Circuit) -> str:
    """The text of a circuit file: edges, scores, the whole graph, the result and the meta data."""
    stderr = [None] * len(circuit) if circuit.stderr is None else circuit.stderr.tolist()
    names = circuit.graph
    rows = zip(circuit.src.tolist(), circuit.dst.tolist(), circuit.score.tolist(), stderr, strict=True)
    edges = [
        {"source": names.sources[s], "destination": names.destinations[d], "score": value, "stderr": error}
        for s, d, value, error in rows
    ]
    return to_json(
        {
            "schema": schema_name("circuit"),
            "meta": jsonable(circuit.meta),
            "result": None if circuit.result is None else result_to_dict(circuit.result),
            "dtype": str(circuit.score.dtype).removeprefix("torch."),
            "has_stderr": circuit.stderr is not None,
            "edges": jsonable(edges),
            "graph": circuit.graph.to_dict(),
        }
    )


def circuit_from_json(text: str, where: str = "the text") -> Circuit:
    """The circuit that `circuit_to_json` wrote, bit for bit; ``where`` names the file in messages.

    Raises:
        FormatError: for anything else: another kind, a newer version, a cut-off file, edges the graph does not have.

    >>> from circuitkit.graph import chain_graph
    >>> circuit = Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"])
    >>> circuit_from_json(circuit_to_json(circuit)).edge_names()
    ['input->m0', 'm0->logits']
    """
    data = parse_json(text, where)
    if not isinstance(data, dict):
        raise FormatError(f"{where} is not a circuit file: got a JSON {type(data).__name__}, expected an object")
    check_schema(data.pop("schema", None), "circuit", where)
    try:
        file = _CircuitFile.model_validate(data)
    except ValidationError as error:
        raise FormatError(f"{where} does not fit the circuit schema: {_first(error)}; write it again") from error
    if file.dtype not in _DTYPES:
        raise FormatError(f"{where} has dtype {file.dtype[:40]!r}, expected one of {', '.join(_DTYPES)}")
    graph = _checked_graph(file.graph, where)
    edges = _edge_indices(file.edges, graph, where)
    dtype = _DTYPES[file.dtype]
    return Circuit(
        graph=graph,
        src=torch.tensor([s for s, _ in edges], dtype=torch.long),
        dst=torch.tensor([d for _, d in edges], dtype=torch.long),
        score=_numbers((edge.score for edge in file.edges), dtype),
        stderr=_numbers((edge.stderr for edge in file.edges), dtype) if file.has_stderr else None,
        result=None if file.result is None else result_from_dict(file.result, where),
        meta=file.meta,
    )


def result_to_dict(result: Result) -> dict[str, Any]:
    """A result as plain JSON data; numbers that are not finite become None."""
    data: dict[str, Any] = jsonable(asdict(result))
    return data


def result_from_dict(data: Mapping[str, Any], where: str = "the data") -> Result:
    """The result that `result_to_dict` wrote.

    Raises:
        FormatError: if a field is missing, unknown or of another type.
    """
    unknown = set(data) - {item.name for item in fields(Result)}
    if unknown:
        raise FormatError(f"{where} has unknown result fields: {', '.join(sorted(unknown))[:200]}; remove them")
    restored = {
        name: math.nan if value is None and name in _REQUIRED_NUMBERS else value for name, value in data.items()
    }
    try:
        # By way of JSON text, where a list is the strict form of a tuple.
        return _result_adapter().validate_json(json.dumps(restored), strict=True)
    except ValidationError as error:
        raise FormatError(f"{where} does not fit the result schema: {_first(error)}; evaluate again") from error


def graph_from_dict(data: Any, where: str) -> Graph:
    """The graph that `Graph.to_dict` wrote, checked. Raises FormatError for anything else."""
    try:
        return _checked_graph(_Graph.model_validate(data), where)
    except ValidationError as error:
        raise FormatError(f"{where} does not hold a graph: {_first(error)}; write it again") from error


def _checked_graph(graph: _Graph, where: str) -> Graph:
    n_src, n_dst = len(graph.sources), len(graph.destinations)
    bad_row = len(graph.mask) != n_src or any(len(row) != n_dst or set(row) - {"0", "1"} for row in graph.mask)
    bad_pair = any(len(pair) != 2 or not (0 <= pair[0] < n_dst and 0 <= pair[1] < n_src) for pair in graph.feeds)
    if bad_row or bad_pair:
        what = "mask" if bad_row else "feeds"
        raise FormatError(f"{where}: the graph's {what} does not fit {n_src} sources and {n_dst} destinations")
    try:
        return Graph.from_dict(graph.model_dump())
    except GraphError as error:
        raise FormatError(f"{where}: {error}") from error


def _edge_indices(edges: list[_Edge], graph: Graph, where: str) -> list[tuple[int, int]]:
    try:
        found = [graph.edge(f"{edge.source}->{edge.destination}") for edge in edges]
    except GraphError as error:
        raise FormatError(f"{where} has an edge that its graph does not: {error}") from error
    if len(set(found)) < len(found):
        double = next(edge for i, edge in enumerate(found) if edge in found[:i])
        name = f"{graph.sources[double[0]]}->{graph.destinations[double[1]]}"
        raise FormatError(f"{where} has the edge {name} twice; keep one of them")
    return found


def _numbers(values: Iterable[float | None], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64).to(dtype)


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
    if isinstance(value, dict) and value:
        parts = (f"{json.dumps(key)}: {json.dumps(item, allow_nan=False)}" for key, item in value.items())
        return "{\n " + ",\n ".join(parts) + "\n}"
    return json.dumps(value, allow_nan=False)


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'top level'}: {problem['msg']}"


@cache
def _result_adapter() -> TypeAdapter[Result]:
    return TypeAdapter(Result)
