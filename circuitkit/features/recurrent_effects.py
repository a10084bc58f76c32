"""End-to-end effects in a recurrent network: of every input step through all frozen paths, and what really happens.

    target = sum over steps and channels of effect(x_t) + constants        gates and secants held: exact for the run
    effect(unit u at t) = h_u(t) * d target / d h_u(t)                     what setting it to 0 takes away, gates held
    measured(unit u at t) = target - target with h_u(t) = 0                the network itself, gates free

The first two come from one sweep without nodes in between. The third is as many runs as there are units and steps.
Where the two disagree, gates (or saturated units) respond to the change, and the frozen graph does not say how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.features.recurrent import check_sums, total_rows
from circuitkit.features.recurrent_local import FrozenRecurrence, frozen_recurrence
from circuitkit.features.recurrent_nodes import Placed, placed
from circuitkit.features.recurrent_targets import Final, RecurrentTarget, final_targets, values_of
from circuitkit.models.recurrent.model import RecurrentModel
from circuitkit.models.recurrent.parts import FEATURES
from circuitkit.models.recurrent.stepper import run_network

if TYPE_CHECKING:
    import plotly.graph_objects as go

AT_ONCE = 2_000_000  # numbers of all runs together


@dataclass(frozen=True, eq=False)
class InputEffects:
    """Effects on some targets through all frozen paths.

    Args:
        names: of the targets.
        inputs: effect of each channel of each step (one channel where tokens are read).
        constants: of all biases and start vectors together; with the inputs they add up to the totals.
        states: for each write, of every number of it at every step; these overlap in time and do not add up.
        totals: of each target in the run.
        labels: of the steps: token ids, or their numbers.
    """

    names: tuple[str, ...]
    inputs: Float[Tensor, "target step channel"]
    constants: Float[Tensor, " target"]
    states: Mapping[str, Float[Tensor, "target step unit"]]
    totals: Float[Tensor, " target"]
    labels: tuple[str, ...]

    def plot(self, target: int = 0) -> go.Figure:
        """Effects of the inputs on one of the targets, step by step."""
        from circuitkit.figures.effects_over_time import effects_over_time

        return effects_over_time(
            self.inputs[target], float(self.constants[target]), self.labels, f"effect on {self.names[target]}"
        )


@torch.no_grad()
def input_effects(
    model: RecurrentModel, inputs: Tensor, targets: Sequence[RecurrentTarget] | None = None
) -> InputEffects:
    """Effects of every input step, and of every unit, on some targets with gates and secants held.

    Args:
        model: a recurrent network.
        inputs: token ids ``[step]`` or numbers ``[step, size]``.
        targets: as for `circuitkit.features.recurrent.recurrent_attribution_graph`.

    Raises:
        OptionError: if inputs or targets do not fit.
        TaskError: for inputs that the model cannot read.
        UnsupportedModel: if a layer is not linear with its gates held, or effects do not add up to a target.

    >>> import circuitkit as ck
    >>> from torch import nn
    >>> found = input_effects(ck.load(nn.RNN(2, 3, batch_first=True)), torch.randn(5, 2))
    >>> found.inputs.shape, bool((found.inputs.sum((1, 2)) + found.constants - found.totals).abs().max() < 1e-5)
    (torch.Size([3, 5, 2]), True)
    """
    local = frozen_recurrence(model, inputs)
    finals = final_targets(local, targets)
    last = max(final.step for final in finals) if local.network.causal else local.steps - 1
    made = placed(local, {}, 0, last, cut=False)
    rows = [final.rows for final in finals]
    found = total_rows(local, made, rows, last)
    totals = torch.cat([r.values for r in rows])
    roots = torch.tensor([node.kind not in ("unit", "latent") for node in made.nodes], device=found.device)
    check_sums(rows, found * roots, totals)
    constants = torch.tensor([node.kind == "bias" for node in made.nodes], device=found.device)
    write = local.network.input
    return InputEffects(
        tuple(final.name for final in finals),
        _spread(local, made, found, write.name, write.n),
        (found * constants).sum(1),
        {w.name: _spread(local, made, found, w.name, w.size) for w in local.network.writes[1:]},
        totals,
        tuple(str(label) for label in (inputs.tolist() if model.numbers is None else range(local.steps))),
    )


def _spread(
    local: FrozenRecurrence, made: Placed, found: Float[Tensor, "target node"], write: str, size: int
) -> Float[Tensor, "target step number"]:
    """Effects by node on the grid of steps and numbers; 0 where there is no node."""
    out = found.new_zeros(len(found), local.steps, size)
    for t in range(local.steps):
        source = made.standing.at.get((write, t))
        if source is not None and len(source.columns):
            index = [made.nodes[c].index for c in source.columns.tolist()]
            out[:, t, [0 if size == 1 else i for i in index]] = found[:, source.columns]  # type: ignore[misc]
    return out


@torch.no_grad()
def measured_effects(
    model: RecurrentModel, inputs: Tensor, write: str, targets: Sequence[RecurrentTarget] | None = None
) -> Float[Tensor, "target step unit"]:
    """What each target loses when one unit is set to 0 at one step and everything else runs on freely.

    Args:
        model: a recurrent network.
        inputs: token ids ``[step]`` or numbers ``[step, size]``.
        write: whose units, such as ``"l0.h"``.
        targets: as for `input_effects`, in the same order.

    Raises:
        OptionError: for a write that no layer has.

    >>> import circuitkit as ck
    >>> from torch import nn
    >>> measured_effects(ck.load(nn.RNN(2, 3, batch_first=True)), torch.randn(5, 2), "l0.h").shape
    torch.Size([3, 5, 3])
    """
    known = [w.name for w in model.network.writes[1:]]
    if write not in known:
        raise OptionError(f"got the write {write!r}, expected one of {', '.join(known)}")
    local = frozen_recurrence(model, inputs)
    finals = final_targets(local, targets)
    size = model.network.write(write).size
    x, n = local.like, local.steps * size
    lost = []
    for some in torch.arange(n, device=x.device).split(max(1, AT_ONCE // (local.steps * model.width))):
        keep = torch.ones(len(some), n, dtype=torch.bool, device=x.device)
        keep[torch.arange(len(some)), some] = False
        made = _run_without(model, x.expand(len(some), *x.shape), write, keep.unflatten(1, (local.steps, size)))
        lost.append(
            _values(local, finals, {name: v[None] for name, v in local.values.items()}) - _values(local, finals, made)
        )
    return torch.cat(lost, 1).unflatten(1, (local.steps, size))


def _run_without(
    model: RecurrentModel, x: Float[Tensor, "row step size"], write: str, keep: Bool[Tensor, "row step unit"]
) -> dict[str, Tensor]:
    def edit(site: str, value: Tensor, step: int | None) -> Tensor:
        if site != write:
            return value
        return value * (keep if step is None else keep[:, step])

    with model.quiet():
        made = run_network(model.network, x, edit=edit)
    return {name: value for name, value in made.items() if name != FEATURES}


def _values(
    local: FrozenRecurrence, finals: Sequence[Final], values: Mapping[str, Tensor]
) -> Float[Tensor, "target row"]:
    return torch.stack([values_of(local, final, values) for final in finals])
