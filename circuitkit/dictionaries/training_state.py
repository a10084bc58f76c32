"""Everything that the next training step depends on, and the file it is kept in.

A safetensors file: weights, the optimiser's two moments, for how many steps each latent has been silent, the state of
the random generator, the units and the history. Nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from circuitkit.checkpoints import read_checkpoint, write_checkpoint
from circuitkit.dictionaries.units import Units

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
    return write_checkpoint(path, "training", state.step, run, _tensors(state))


def load_state(path: str | Path, run: Mapping[str, Any], begin: State) -> State:
    """What `save_state` wrote, or ``begin`` if there is no file yet.

    Raises:
        FormatError: if the file is truncated, of another kind or does not fit.
        OptionError: if it belongs to another run; says in what that differs.
    """
    found = read_checkpoint(path, "training", run, _tensors(begin), growing=("history",))
    if found is None:
        return begin
    step, tensors = found
    named = {g: {name: tensors[f"{g}.{name}"] for name in getattr(begin, g)} for g in _GROUPS}
    units = Units(tensors["units.read"], tensors["units.write"])
    return State(step, random=tensors["random"], units=units, history=tensors["history"], **named)


def _tensors(state: State) -> Named:
    named = {f"{group}.{name}": t for group in _GROUPS for name, t in getattr(state, group).items()}
    return named | {
        "random": state.random, "history": state.history,
        "units.read": state.units.read, "units.write": state.units.write,
    }  # fmt: skip
