"""Everything that the next training step depends on, and the file it is kept in.

A safetensors file: weights, the optimiser's two moments, for how many steps each latent has been silent, the state of
the random generator, the units and the history. Nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from circuitkit.atomic import write_atomic
from circuitkit.dictionaries.units import Units
from circuitkit.errors import FormatError, OptionError

Named = dict[str, Tensor]
COLUMNS = ("step", "loss", "fvu", "l0", "dead")


@dataclass(frozen=True, eq=False)
class State:
    """Where training stands.

    Args:
        step: how many steps are done.
        value: weights by name; ``0.W_enc`` is the first coder's.
        first: running mean of each gradient.
        second: running mean of each squared gradient.
        silent: for how many steps each latent has not been active, by coder.
        random: state of the generator.
        units: what inputs and targets are multiplied by.
        history: a row of ``COLUMNS`` for some steps.
    """

    step: int
    value: Named
    first: Named
    second: Named
    silent: Named
    random: Tensor
    units: Units
    history: Float[Tensor, "log column"]


_GROUPS = ("value", "first", "second", "silent")


def save_state(state: State, run: Mapping[str, Any], path: str | Path) -> Path:
    """Write the file in one step. Raises FormatError if it cannot be written."""
    from circuitkit.schema import jsonable, schema_name

    tensors = {f"{group}.{name}": t for group in _GROUPS for name, t in getattr(state, group).items()} | _rest(state)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {"schema": schema_name("training"), "step": str(state.step), "run": json.dumps(jsonable(run))}
    return write_atomic(path, to_safetensors(tensors, header))


def load_state(path: str | Path, run: Mapping[str, Any], begin: State) -> State:
    """What `save_state` wrote, or ``begin`` if there is no file yet.

    Raises:
        FormatError: if the file is truncated, of another kind or does not fit.
        OptionError: if it belongs to another run; says in what that differs.
    """
    from circuitkit.schema import check_schema, jsonable, parse_json

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
    check_schema(header.get("schema"), "training", str(path))
    found, wanted = parse_json(header.get("run", "null"), f"the header of {path}") or {}, jsonable(run)
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise OptionError(
                f"{path} belongs to another run: its {name} is {found.get(name)!r}, here it is {wanted[name]!r}; "
                "use the options it was begun with, delete it, or give another file"
            )
    expected = {f"{group}.{name}": t for group in _GROUPS for name, t in getattr(begin, group).items()} | _rest(begin)
    step = header.get("step", "")
    fits = set(tensors) == set(expected) and all(
        tensors[name].shape == t.shape and tensors[name].dtype == t.dtype
        for name, t in expected.items()
        if name != "history"
    )
    if not step.isdecimal() or not fits:
        raise FormatError(f"{path} lacks a tensor, or has one of another shape; delete it to start anew")
    tensors = {name: t.to(expected[name].device) for name, t in tensors.items()}
    named = {g: {name: tensors[f"{g}.{name}"] for name in getattr(begin, g)} for g in _GROUPS}
    units = Units(tensors["units.read"], tensors["units.write"])
    return State(int(step), random=tensors["random"], units=units, history=tensors["history"], **named)


def _rest(state: State) -> Named:
    return {
        "random": state.random, "history": state.history,
        "units.read": state.units.read, "units.write": state.units.write,
    }  # fmt: skip
