"""A file from which learning goes on where it stopped, to the same result bit for bit.

A safetensors file: parameters, the optimiser's two moments of each, how steep the loss has been in every edge, the
state of the random generator, and as text the step and what run it belongs to. Nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from circuitkit.atomic import write_atomic
from circuitkit.errors import FormatError, OptionError
from circuitkit.schema import check_schema, jsonable, parse_json, schema_name

Parameters = dict[str, Tensor]
PARTS = ("value", "first", "second")


@dataclass(frozen=True, eq=False)
class Progress:
    """Everything that the next step depends on.

    Args:
        step: how many steps are done.
        value: what is learned, by name.
        first: running mean of each gradient.
        second: running mean of each squared gradient.
        steepest: the largest slope that the loss has had in each edge, as a magnitude.
        random: state of the generator.
    """

    step: int
    value: Parameters
    first: Parameters
    second: Parameters
    steepest: Float[Tensor, " edge"]
    random: Tensor

    @property
    def felt(self) -> Bool[Tensor, " edge"]:
        """Edges in which the loss has had a slope that is more than rounding."""
        floor = 8 * torch.finfo(self.steepest.dtype).eps * self.steepest.max()
        return self.steepest > floor

    @classmethod
    def begin(cls, value: Parameters, edges: int, seed: int) -> Progress:
        """Before the first step."""
        zero = {name: torch.zeros_like(tensor) for name, tensor in value.items()}
        random = torch.Generator().manual_seed(seed).get_state()
        steepest = next(iter(value.values())).new_zeros(edges)
        return cls(0, value, zero, zero, steepest, random)


def save_progress(progress: Progress, run: Mapping[str, Any], path: str | Path) -> Path:
    """Write the file in one step. Raises FormatError if it cannot be written."""
    tensors = {f"{part}.{name}": t for part in PARTS for name, t in getattr(progress, part).items()}
    tensors |= {"steepest": progress.steepest, "random": progress.random}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"schema": schema_name("learning"), "step": str(progress.step), "run": json.dumps(jsonable(run))}
    return write_atomic(path, to_safetensors(tensors, header))


def load_progress(path: str | Path, run: Mapping[str, Any], begin: Progress) -> Progress:
    """What `save_progress` wrote, or ``begin`` if there is no file yet.

    Raises:
        FormatError: if the file is truncated, of another kind or does not fit.
        OptionError: if it belongs to another run; says in what that differs.
    """
    if not Path(path).exists():
        return begin
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is no checkpoint, or not a whole one ({error}); delete it to start anew, or give another file"
        ) from error
    check_schema(header.get("schema"), "learning", str(path))
    _check_run(parse_json(header.get("run", "null"), f"the header of {path}"), jsonable(run), path)
    expected = {f"{part}.{name}": t for part in PARTS for name, t in getattr(begin, part).items()}
    expected |= {"steepest": begin.steepest, "random": begin.random}
    step = header.get("step", "")
    like = {name: (t.shape, t.dtype) for name, t in expected.items()}
    if not step.isdecimal() or {name: (t.shape, t.dtype) for name, t in tensors.items()} != like:
        raise FormatError(f"{path} lacks a tensor, or has one of another shape; delete it to start anew")
    tensors = {name: tensor.to(expected[name].device) for name, tensor in tensors.items()}
    named = {part: {name: tensors[f"{part}.{name}"] for name in getattr(begin, part)} for part in PARTS}
    return Progress(int(step), steepest=tensors["steepest"], random=tensors["random"], **named)


def _check_run(found: Any, run: Any, path: str | Path) -> None:
    found = found if isinstance(found, dict) else {}
    differ = [name for name in run if found.get(name) != run[name]]
    if differ:
        name = differ[0]
        raise OptionError(
            f"{path} belongs to another run: its {name} is {found.get(name)!r}, here it is {run[name]!r}; "
            "use the options it was begun with, delete it, or give another file"
        )
