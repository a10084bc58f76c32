"""Files from which learning goes on where it stopped: named tensors, how many steps are done, and of which run.

Safetensors files, written in one step; the step and the run are text in the header. Nothing in them is executed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from circuitkit.atomic import write_atomic
from circuitkit.errors import FormatError, OptionError
from circuitkit.schema import check_schema, jsonable, parse_json, schema_name


def write_checkpoint(
    path: str | Path, kind: str, step: int, run: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    """Write the file in one step. Raises FormatError if it cannot be written."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"schema": schema_name(kind), "step": str(step), "run": json.dumps(jsonable(run))}
    return write_atomic(path, to_safetensors(plain, header))


def read_checkpoint(
    path: str | Path, kind: str, run: Mapping[str, Any], like: Mapping[str, Tensor], growing: Collection[str] = ()
) -> tuple[int, dict[str, Tensor]] | None:
    """The step and the tensors that `write_checkpoint` wrote; None if there is no file yet.

    Args:
        kind: of file, as `circuitkit.schema.schema_name` knows it.
        run: what must be equal for one run to go on where another stopped.
        like: tensors of the names, shapes, dtypes and devices that are expected.
        growing: names of those whose shape may be another.

    Raises:
        FormatError: if the file is truncated, of another kind or does not fit.
        OptionError: if it belongs to another run; says in what that differs.
    """
    if not Path(path).exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is no checkpoint, or not a whole one ({error}); delete it to start anew, or give another file"
        ) from error
    check_schema(header.get("schema"), kind, str(path))
    _check_run(parse_json(header.get("run", "null"), f"the header of {path}"), jsonable(run), path)
    step = header.get("step", "")
    fits = tensors.keys() == like.keys() and all(
        name in growing or (tensors[name].shape, tensors[name].dtype) == (t.shape, t.dtype) for name, t in like.items()
    )
    if not step.isdecimal() or not fits:
        raise FormatError(f"{path} lacks a tensor, or has one of another shape; delete it to start anew")
    return int(step), {name: tensor.to(like[name].device) for name, tensor in tensors.items()}


def _check_run(found: Any, run: Any, path: str | Path) -> None:
    found = found if isinstance(found, dict) else {}
    differ = [name for name in run if found.get(name) != run[name]]
    if differ:
        name = differ[0]
        raise OptionError(
            f"{path} belongs to another run: its {name} is {found.get(name)!r}, here it is {run[name]!r}; "
            "use the options it was begun with, delete it, or give another file"
        )
