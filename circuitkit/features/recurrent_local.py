"""One run of a recurrent network as a linear map from its inputs, starts and biases: `FrozenRecurrence`.

The network is run once, in float64: networks are small, and along a few hundred steps rounding errors of float32 grow
to more than a row's sum allows. `circuitkit.features.recurrent_cells` says how each stage is linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.features.recurrent_cells import Frozen, frozen_stage
from circuitkit.models.recurrent.ends import check_finite
from circuitkit.models.recurrent.model import RecurrentModel
from circuitkit.models.recurrent.parts import FEATURES, Block, Network, Stage, Weights
from circuitkit.models.recurrent.stepper import run_network


@dataclass(frozen=True, eq=False)
class FrozenRecurrence:
    """What a sweep needs of one run.

    Args:
        model: the network.
        inputs: of the run, as the model takes them, without the axis of examples.
        weights: in the dtype of the run.
        values: of every write, at the run's steps.
        seen: every site, at the run's steps.
        frozen: each stage as a linear map.
    """

    model: RecurrentModel
    inputs: Tensor
    weights: Weights
    values: Mapping[str, Float[Tensor, "step _"]]
    seen: Mapping[str, Float[Tensor, "step _"]]
    frozen: Mapping[Stage, Frozen]

    @property
    def network(self) -> Network:
        """The layers as data."""
        return self.model.network

    @property
    def steps(self) -> int:
        """Length of the run."""
        return len(self.values[self.network.input.name])

    @property
    def like(self) -> Tensor:
        """A tensor of the run's dtype and device."""
        return self.values[self.network.input.name]

    @cached_property
    def lag(self) -> int:
        """How many steps back a link looks at most."""
        return max((link.lag for _, stage in self.network.stages for link in stage.links), default=0)

    @cached_property
    def order(self) -> Mapping[str, tuple[int, int]]:
        """For each write the number of its block and its place in there; -1 for the input."""
        found = {self.network.input.name: (-1, 0)}
        for number, block in enumerate(self.network.blocks):
            found |= {write.name: (number, place) for place, write in enumerate(block.writes)}
        return found

    def stage_of(self, write: str, step: int) -> int:
        """Order of computation of a write at a step: blocks one after the other, each over all steps."""
        number, place = self.order[write]
        if number < 0:
            return 0
        block = self.network.blocks[number]
        done = self.steps - 1 - step if block.reverse else step
        first = 1 + number * self.steps * self._longest
        # Where nothing is carried on, all steps of a stage are computed together.
        return first + (done * self._longest + place if block.recurrent else place * self.steps + done)

    @property
    def last_stage(self) -> int:
        """Behind all writes: where outputs stand."""
        return 1 + len(self.network.blocks) * self.steps * self._longest

    @cached_property
    def _longest(self) -> int:
        return max(len(block.writes) for block in self.network.blocks)

    def block_of(self, write: str) -> Block:
        """The block that makes a write."""
        return self.network.blocks[self.order[write][0]]


@torch.no_grad()
def frozen_recurrence(model: RecurrentModel, inputs: Tensor) -> FrozenRecurrence:
    """A run of one input with its gates and secants.

    Args:
        model: a recurrent network.
        inputs: token ids ``[step]`` or numbers ``[step, size]``.

    Raises:
        OptionError: if there is more than one input, or none.
        TaskError: for inputs that the model cannot read.
        UnsupportedModel: if a value is not finite, or a stage has no frozen form.
    """
    wanted = 1 if model.numbers is None else 2
    if inputs.dim() != wanted or not len(inputs):
        shape = "ids [step]" if model.numbers is None else f"numbers [step, {model.numbers}]"
        raise OptionError(
            f"got inputs of shape {list(inputs.shape)}, expected one sequence of at least one step: {shape}"
        )
    x = model.vectors(inputs[None]).double()
    shown: dict[str, list[Tensor]] = {}

    def keep(site: str, value: Tensor, _step: int | None) -> Tensor:
        shown.setdefault(site, []).append(value)
        return value

    with model.quiet():
        made = run_network(model.network, x, edit=keep)
    check_finite(model.network, made)
    values = {name: value[0] for name, value in made.items() if name != FEATURES}
    seen: dict[str, Tensor] = {}
    for block in model.network.blocks:
        for site in (site for site in shown if site.rpartition(".")[0] == block.stem):
            seen[site] = _over_time(shown[site], reverse=block.reverse, steps=x.shape[1])
    weights = Weights.of(model.network, x)
    frozen = {s: frozen_stage(block, s, seen, values) for block in model.network.blocks for s in block.stages}
    return FrozenRecurrence(model, inputs, weights, values, seen, frozen)


def _over_time(found: list[Tensor], *, reverse: bool, steps: int) -> Float[Tensor, "step _"]:
    """One site of the only example, from what it showed step by step or at once."""
    if len(found) == 1:
        return found[0].reshape(-1, found[0].shape[-1]).expand(steps, -1)
    each = torch.stack([x.reshape(-1) for x in found])
    return each.flip(0) if reverse else each
