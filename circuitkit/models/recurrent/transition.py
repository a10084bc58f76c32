"""One time step of a recurrent network as a function of its state: what dynamical-systems tools work on.

    s(t) = F(s(t-1), x(t))        s holds every write that is read at a later step, once for each lag up to the longest

The cell of an LSTM is in the state beside h; the last inputs are, where a layer reads its input with a lag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import GraphError, UnsupportedModel
from circuitkit.models.recurrent.parts import Block, Link, Network, Slot, Weights
from circuitkit.models.recurrent.stepper import plus, rows_of, run_block, shifted, through

Step = Callable[[Tensor, Tensor], Tensor]  # (state [..., state], x [..., input]) -> state [..., state]


@dataclass(frozen=True, eq=False)
class Transition:
    """One step of a network, as a pure function of its state and input; made by `transition`.

    Args:
        network: the parts and, by reference, the weights.
        lags: for each write that is read later, its name and the longest lag, in the order of the state vector.
    """

    network: Network
    lags: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Numbers in the state."""
        return sum(lag * self.network.write(name).size for name, lag in self.lags)

    @property
    def names(self) -> tuple[str, ...]:
        """What each number of the state is: ``l0.h3``, or ``l0.h3(-1)`` for one that was written a step before."""
        return tuple(
            f"{name}{i}" + f"(-{back})" * (back > 0)
            for name, lag in self.lags
            for back in range(lag)
            for i in range(self.network.write(name).size)
        )

    def __call__(
        self, state: Float[Tensor, "*row state"], x: Float[Tensor, "*#row input"]
    ) -> Float[Tensor, "*row state"]:
        """The state after reading ``x``."""
        return self.frozen(state)(state, x)

    def frozen(self, like: Tensor) -> Step:
        """The same function with the weights fetched once, in the dtype and on the device of a tensor."""
        weights = Weights.of(self.network, like)
        return lambda state, x: self._join(self._values(state, x, weights), self._split(state))

    def values(self, state: Float[Tensor, "*row state"], x: Float[Tensor, "*#row input"]) -> dict[str, Tensor]:
        """All writes of one step, ``[..., size]`` each, by name."""
        return self._values(state, x, Weights.of(self.network, state))

    def features(
        self, state: Float[Tensor, "*row state"], x: Float[Tensor, "*#row input"]
    ) -> Float[Tensor, "*row feature"]:
        """What the read-out reads after one step from a state."""
        values = self.values(state, x)
        return torch.cat([values[name] for name in self.network.features], -1)

    def start(self, like: Tensor) -> Float[Tensor, " state"]:
        """The state before the first step, in the dtype and on the device of a tensor."""
        starts = Weights.of(self.network, like).starts
        parts = [starts[name] for name, lag in self.lags for _ in range(lag)]
        return torch.cat(parts) if parts else like.new_zeros(0)

    def state_of(self, values: Mapping[str, Float[Tensor, "*row step size"]]) -> Float[Tensor, "*row step state"]:
        """The state after every step of a run, from its writes.

        Raises:
            GraphError: if a write is missing.
        """
        if missing := [name for name, _ in self.lags if name not in values]:
            raise GraphError(f"the state holds {missing}, which the values lack; give all writes of a run")
        like = next(iter(values.values()))
        starts = Weights.of(self.network, like).starts
        parts = [
            shifted(values[name], back, starts[name], reverse=False) for name, lag in self.lags for back in range(lag)
        ]
        return torch.cat(parts, -1) if parts else like[..., :0]

    def jacobians(
        self, state: Float[Tensor, "point state"], x: Float[Tensor, "point input"]
    ) -> tuple[Float[Tensor, "point state state"], Float[Tensor, "point state input"]]:
        """dF/ds and dF/dx at each point: row i holds the derivatives of number i of the next state."""
        step = self.frozen(state)
        by_state, by_input = torch.func.vmap(torch.func.jacrev(step, argnums=(0, 1)))(state, x)
        return by_state, by_input

    def _values(self, state: Tensor, x: Tensor, weights: Weights) -> dict[str, Tensor]:
        shape = torch.broadcast_shapes(state.shape[:-1], x.shape[:-1])
        past, now = self._split(state), {self.network.input.name: x.expand(*shape, x.shape[-1])}
        for block in self.network.blocks:
            outer = _sums(block, past, now, weights)

            def inner(link: Link, value: Tensor, _step: int) -> Tensor:
                return through(value, weights.links[link])

            before = {write.name: list(past.get(write.name, ())) for write in block.writes}
            made = run_block(block, 1, outer, inner, weights, before=before)
            now |= {name: y[..., 0, :].expand(*shape, y.shape[-1]) for name, y in made.items()}
        return now

    def _split(self, state: Tensor) -> dict[str, list[Tensor]]:
        """What was written at the steps before, latest last."""
        out, first = dict[str, list[Tensor]](), 0
        for name, lag in self.lags:
            size = self.network.write(name).size
            parts = [state[..., first + k * size : first + (k + 1) * size] for k in range(lag)]
            out[name], first = parts[::-1], first + lag * size
        return out

    def _join(self, now: Mapping[str, Tensor], past: Mapping[str, list[Tensor]]) -> Tensor:
        parts = [part for name, lag in self.lags for part in (now[name], *past[name][:0:-1])[:lag]]
        return torch.cat(parts, -1)


def transition(network: Network) -> Transition:
    """One time step of a network as a function of its state.

    Raises:
        UnsupportedModel: if a layer runs backward or sees all steps at once, so that no state sums up the past.

    >>> from circuitkit.models.recurrent.cells.base import Place, cell_of
    >>> from circuitkit.models.recurrent.parts import Write
    >>> read, module = Write("input", 2, kind="input"), torch.nn.LSTM(2, 3, batch_first=True)
    >>> parts = cell_of(module).describe(module, Place(0, (read,)))
    >>> step = transition(Network(read, parts.blocks, parts.features))
    >>> step.names, step(torch.zeros(4, 6), torch.ones(4, 2)).shape
    (('l0.c0', 'l0.c1', 'l0.c2', 'l0.h0', 'l0.h1', 'l0.h2'), torch.Size([4, 6]))
    """
    for block in network.blocks:
        if block.reverse or block.across:
            does = "runs backward in time" if block.reverse else "sees all steps at once"
            raise UnsupportedModel(
                f"layer {block.layer} ({block.stem or 'unnamed'}) {does}: no state sums up its past. "
                "Give a network whose steps depend on earlier ones only"
            )
    lags: dict[str, int] = {}
    for _, stage in network.stages:
        for link in stage.links:
            if link.lag > 0:
                lags[link.source] = max(link.lag, lags.get(link.source, 0))
    order = [write.name for write in network.writes if write.name in lags]
    return Transition(network, tuple((name, lags[name]) for name in order))


def _sums(
    block: Block, past: Mapping[str, list[Tensor]], now: Mapping[str, Tensor], weights: Weights
) -> dict[Slot, Tensor | None]:
    """What biases and links from other blocks add to every slot at this step, with an axis of one step."""
    out: dict[Slot, Tensor | None] = {}
    for stage in block.stages:
        out |= {slot: weights.biases[slot] for slot in stage.slots}
        for link in stage.links:
            if link.source in block.own:
                continue
            x = past[link.source][-link.lag] if link.lag else now[link.source]
            y = through(x, weights.links[link])[..., None, :]
            for slot, rows in rows_of(stage, link):
                out[slot] = plus(out[slot], y[..., rows])
    return out
