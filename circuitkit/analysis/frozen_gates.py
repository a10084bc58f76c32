"""Frozen-gate attention of LSTMs and GRUs: which earlier step each unit's state came from, exactly, on one run.

    LSTM   c_t = sum over s <= t of (prod of f_r, s < r <= t) i_s g_s      + (prod of f_r, r <= t) c_0
    GRU    h_t = sum over s <= t of (prod of z_r, s < r <= t) (1 - z_s) n_s + (prod of z_r, r <= t) h_0

Gates are kept at the values they took, as an attention pattern is kept when a head's values are attributed. The sum
is exact on that run. It is *local*: gates and the candidates g_s, n_s themselves depend on earlier states, so a large
weight says where the state's value came from, not what would happen if that step's input had been another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from circuitkit.analysis.attention_maps import AttentionMaps, chosen_units, recurrence_maps
from circuitkit.errors import UnsupportedModel
from circuitkit.models.recurrent.parts import Block, Weights

if TYPE_CHECKING:
    from circuitkit.models.recurrent.model import RecurrentModel


At = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Form:
    """How a gated cell's state is a sum over the past, from what its sites showed."""

    what: str
    state: str
    sites: frozenset[str]
    decay: Callable[[At], Tensor]
    strength: Callable[[At], Tensor]
    value: Callable[[At], Tensor]


def _in_phase(at: At, gate: str) -> Tensor:
    """The encoder's gate while it reads, the decoder's while it writes."""
    return (1 - at["phase_pre"]) * at[f"enc_{gate}"] + at["phase_pre"] * at[f"dec_{gate}"]


_FORMS = (
    _Form(
        "LSTM cell state",
        "c",
        frozenset(("f", "i", "g", "c", "kept", "new")),
        decay=lambda at: at["f"],
        strength=lambda at: at["i"],
        value=lambda at: at["g"],
    ),
    _Form(
        "GRU state",
        "h",
        frozenset(("z", "n", "h", "kept", "new")),
        decay=lambda at: at["z"],
        strength=lambda at: 1 - at["z"],
        value=lambda at: at["n"],
    ),
    _Form(
        "encoder-decoder GRU state",
        "h",
        frozenset(("enc_z", "dec_z", "enc_n", "dec_n", "phase_pre", "h")),
        decay=lambda at: _in_phase(at, "z"),
        strength=lambda at: 1 - _in_phase(at, "z"),
        value=lambda at: _in_phase(at, "n"),
    ),
)


def frozen_gates(
    model: RecurrentModel, inputs: Tensor, *, units: Sequence[int] | None = None
) -> dict[str, AttentionMaps]:
    """The frozen-gate maps of every LSTM and GRU layer and direction, by its name (``l0``, ``l0r``).

    Args:
        model: a loaded recurrent model.
        inputs: as the model takes them: token ids, or numbers ``[batch, step, size]``.
        units: which units of each layer; all without it. Memory is O(batch units steps^2).

    Raises:
        UnsupportedModel: if the model has no LSTM or GRU layer, or its run is not finite.
        OptionError: if a layer has no such unit.

    >>> import circuitkit as ck, torch
    >>> from torch import nn
    >>> maps = frozen_gates(ck.load(nn.LSTM(3, 4, batch_first=True)), torch.randn(2, 5, 3))["l0"]
    >>> maps.pattern.shape, maps.error < 1e-6
    (torch.Size([2, 4, 5, 5]), True)
    """
    found = [(block, form) for block in model.network.blocks if (form := _form(block)) is not None]
    if not found:
        raise UnsupportedModel("the model has no LSTM or GRU layer; `implicit_attention` reads linear recurrences")
    run = model.trace(inputs)
    starts = Weights.of(model.network, next(iter(run.values()))).starts
    return {block.stem: _maps(block, form, run, starts, units) for block, form in found}


def _form(block: Block) -> _Form | None:
    sites = {site for stage in block.stages for site in stage.sites}
    return next((form for form in _FORMS if form.sites <= sites), None)


def _maps(
    block: Block, form: _Form, run: Mapping[str, Tensor], starts: Mapping[str, Tensor], units: Sequence[int] | None
) -> AttentionMaps:
    state = f"{block.stem}.{form.state}"
    chosen = chosen_units(block.stem, run[state].shape[-1], units)
    shown = {site: run[f"{block.stem}.{site}"] for site in form.sites}
    at = {site: x if x.shape[-1] == 1 else x[..., chosen] for site, x in shown.items()}
    return recurrence_maps(
        block.stem,
        f"{form.what}, gates frozen",
        tuple(f"{state}{i}" for i in chosen),
        decay=form.decay(at),
        strength=form.strength(at),
        values=form.value(at),
        first=starts[state][chosen],
        output=at[form.state],
        reverse=block.reverse,
        local=True,
    )
