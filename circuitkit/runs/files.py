"""Scores, circuits and results on disk: written in one step, checked when read, equal bit for bit when back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from circuitkit.atomic import write_atomic
from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError, GraphError
from circuitkit.result import Result
from circuitkit.schema import (
    check_schema,
    circuit_from_json,
    circuit_to_json,
    graph_from_dict,
    jsonable,
    parse_json,
    result_from_dict,
    result_to_dict,
    schema_name,
    to_json,
)
from circuitkit.scores import Scores

__all__ = [
    "load_circuit",
    "load_result",
    "load_scores",
    "result_from_dict",
    "result_to_dict",
    "save_circuit",
    "save_result",
    "save_scores",
    "write_atomic",
]

LARGEST_JSON = 512 * 1024**2


def save_scores(scores: Scores, path: str | Path) -> Path:
    """Write values, standard errors, graph, method, options and provenance to one safetensors file.

    Raises:
        FormatError: if the file cannot be written.
    """
    tensors = {"values": scores.values}
    if scores.stderr is not None:
        tensors["stderr"] = scores.stderr
    if scores.selected is not None:
        tensors["selected"] = scores.selected
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "method": scores.method,
        "options": jsonable(scores.options),
        "signed": scores.signed,
        "comparable": scores.comparable,
        "n_examples": scores.n_examples,
        "provenance": jsonable(scores.provenance),
    }
    metadata = {
        "schema": schema_name("scores"),
        "header": json.dumps(header, allow_nan=False),
        "graph": json.dumps(scores.graph.to_dict(), allow_nan=False),
    }
    return write_atomic(path, to_safetensors(tensors, metadata))


def load_scores(path: str | Path) -> Scores:
    """Read what `save_scores` wrote.

    Raises:
        FormatError: if the file is missing, truncated, of another kind or of a newer version.
    """
    _check_file(path, "scores")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is truncated or not a safetensors file ({error}); score again") from error
    check_schema(metadata.get("schema"), "scores", str(path))
    header = parse_json(metadata.get("header", "null"), f"the header of {path}")
    graph = graph_from_dict(parse_json(metadata.get("graph", "null"), f"the graph of {path}"), str(path))
    names = {"method", "options", "signed", "comparable", "n_examples", "provenance"}
    if isinstance(header, dict):
        header = {"comparable": True} | header  # files written before 0.2 have no such field
    if not isinstance(header, dict) or set(header) != names or "values" not in tensors:
        raise FormatError(f"{path} lacks its values or one of {', '.join(sorted(names))}; score again")
    for name, tensor in tensors.items():
        fits = tensor.dtype == torch.bool if name == "selected" else tensor.is_floating_point()
        if name not in ("values", "stderr", "selected") or tensor.shape != graph.mask.shape or not fits:
            raise FormatError(
                f"{path}: got the tensor {name!r} of shape {tuple(tensor.shape)} and {tensor.dtype}, expected "
                "floating-point values and stderr and boolean selected edges of shape "
                f"{tuple(graph.mask.shape)}; score again"
            )
    try:
        return Scores(graph=graph, **tensors, **header)
    except (GraphError, TypeError) as error:
        raise FormatError(f"{path} does not hold scores: {error}") from error


def save_circuit(circuit: Circuit, path: str | Path) -> Path:
    """Write a circuit's edges, graph, result and meta data as JSON; the ranking it came from is not written.

    Raises:
        FormatError: if the file cannot be written.
    """
    return write_atomic(path, circuit_to_json(circuit))


def load_circuit(path: str | Path) -> Circuit:
    """Read what `save_circuit` wrote.

    Raises:
        FormatError: if the file is missing, truncated, of another kind, of a newer version or inconsistent.
    """
    return circuit_from_json(_read_text(path, "circuit"), str(path))


def save_result(result: Result, path: str | Path, *, provenance: Mapping[str, Any] | None = None) -> Path:
    """Write a result as JSON, with whatever is known of where it came from (options, versions, hashes).

    Raises:
        FormatError: if the file cannot be written.
    """
    data = {"schema": schema_name("result"), **result_to_dict(result)}
    return write_atomic(path, to_json(data | {"provenance": jsonable(provenance or {})}))


def load_result(path: str | Path) -> Result:
    """Read what `save_result` wrote, without its provenance.

    Raises:
        FormatError: if the file is missing, truncated, of another kind or of a newer version.
    """
    data = parse_json(_read_text(path, "result"), str(path))
    if not isinstance(data, dict):
        raise FormatError(f"{path} is not a result file: got a JSON {type(data).__name__}, expected an object")
    check_schema(data.pop("schema", None), "result", str(path))
    data.pop("provenance", None)
    return result_from_dict(data, str(path))


def _check_file(path: str | Path, kind: str) -> None:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FormatError(f"{path} {what}; expected a {kind} file. Check the path")


def _read_text(path: str | Path, kind: str) -> str:
    _check_file(path, kind)
    try:
        size = Path(path).stat().st_size
        if size > LARGEST_JSON:
            raise FormatError(f"{path} has {size:,} bytes, more than any {kind} file; check the path")
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text ({error.reason}); expected a {kind} file in JSON") from error
    except OSError as error:
        raise FormatError(f"could not read {path}: {error.strerror or error}") from error
