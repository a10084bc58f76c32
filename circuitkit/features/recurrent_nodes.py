"""What stands where in the graph of a recurrent network: inputs, units or latents and errors, biases, starts.

x0@3, input@3       an input channel, or the token, of one step; channels that are 0 have no node
l0.h5@3             unit 5 of a write at one step; units that are 0 have no node
l0.h.f5@3           a latent of the dictionary on that write; what it leaves is l0.h.error@3
l0.bias             all constants of a layer, of its dictionaries too
l0.h.start          a start vector that is not zero; a constant of the network, so of kind ``bias``
l0.h.before@3       with a window: the whole write up to the step before it; nothing explains it: an error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.sites import check_fits
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError
from circuitkit.features.affine import in_dtype_of
from circuitkit.features.graph import FeatureNode
from circuitkit.features.recurrent_local import FrozenRecurrence
from circuitkit.features.recurrent_sweep import Rows, Source, Standing
from circuitkit.models.hooked import Model
from circuitkit.models.recurrent.parts import Write


@dataclass(frozen=True, eq=False)
class Placed:
    """Nodes in the order of their columns, where they stand, and the row of every unit or latent.

    Args:
        nodes: of the graph, targets left out.
        standing: for sweeps.
        rows: of units and latents, one group for each write and step, from the first stage to the last.
    """

    nodes: tuple[FeatureNode, ...]
    standing: Standing
    rows: tuple[Rows, ...]


def coders_of(model: Model, dictionaries: Sequence[Dictionary]) -> dict[str, SparseCoder]:
    """The coder of each write that has a dictionary.

    Raises:
        OptionError: for anything but one SAE on a write of one of the network's layers.
    """
    found = dict[str, SparseCoder]()
    for dictionary in dictionaries:
        check_fits(dictionary, model)
        name = dictionary.read.name
        if dictionary.kind != "sae" or dictionary.coder.W_skip is not None:
            raise OptionError(
                f"got a {dictionary.kind} from {dictionary.read} to {', '.join(map(str, dictionary.writes))}; graphs "
                "of recurrent networks are made of SAEs, which read and write one state"
            )
        if name == model.network.input.name:  # type: ignore[attr-defined]
            raise OptionError(f"got a dictionary on {name}, the input, which has nodes of its own; use a layer's state")
        if name in found:
            raise OptionError(f"got two dictionaries that read {dictionary.read}, expected one; leave one of them out")
        found[name] = dictionary.coder
    return found


def placed(
    local: FrozenRecurrence, coders: Mapping[str, SparseCoder], first: int, last: int, *, cut: bool = True
) -> Placed:
    """Nodes of a window of steps.

    Args:
        local: the frozen run.
        coders: SAEs by write; without any, all units of all writes are nodes.
        first: first step of the window.
        last: last step of the window.
        cut: whether effects stop at these nodes, as in a graph of direct effects.

    Raises:
        OptionError: if a dictionary's latents are not finite, or none of them is active.
    """
    builder = _Builder(local, first, last)
    builder.inputs()
    builder.constants(coders)
    for block in local.network.blocks:
        for write in block.writes:
            if write.name in coders:
                builder.latents(write, in_dtype_of(coders[write.name], local.like), f"{block.stem}")
            elif not coders:
                builder.units(write)
    if coders and not builder.rows:
        raise OptionError(
            f"none of the dictionaries has an active latent on this input; are they trained on this model, at "
            f"{', '.join(coders)}?"
        )
    names = frozenset(coders or (w.name for block in local.network.blocks for w in block.writes))
    return builder.done(names if cut else frozenset())


class _Builder:
    def __init__(self, local: FrozenRecurrence, first: int, last: int) -> None:
        self.local, self.first, self.steps = local, first, range(first, last + 1)
        self.nodes: list[FeatureNode] = []
        self.at: dict[tuple[str, int], Source] = {}
        self.bias, self.start, self.before = dict[str, int](), dict[str, int](), dict[str, int]()
        self.rows: list[Rows] = []
        # A network without an embedding shows its inputs' own numbers.
        self.ids = None if local.model.numbers is not None else local.inputs.tolist()

    def done(self, cut: frozenset[str]) -> Placed:
        standing = Standing(len(self.nodes), self.at, cut, self.bias, self.start, self.before, self.first)
        rows = sorted(self.rows, key=lambda r: self.local.stage_of(r.write, r.step))
        return Placed(tuple(self.nodes), standing, tuple(rows))

    def _node(self, name: str, kind: str, write: str, step: int | None, index: int | None, value: float) -> int:
        site = write if write.startswith("l") and "." not in write else f"state.{write}"
        place = self.local.order.get(write)
        block = None if place is None or place[0] < 0 else self.local.network.blocks[place[0]]
        computed = block is not None and step is not None and kind in ("unit", "latent")
        stage = self.local.stage_of(write, step) if computed and step is not None else 0
        layer = -1 if block is None else block.layer
        self.nodes.append(FeatureNode(name, kind, layer, site, step, index, value, stage))
        return len(self.nodes) - 1

    def inputs(self) -> None:
        """One node for each channel, or for the token, of each step."""
        write, values = self.local.network.input, self.local.values[self.local.network.input.name]
        for t in self.steps:
            each = values[t].unflatten(0, (write.n, write.width))
            active = each.any(1).nonzero().flatten()
            vectors = (torch.eye(write.n).to(each)[:, :, None] * each).flatten(1)[active]
            columns = []
            for i in active.tolist():
                name = f"{write.name}@{t}" if write.n == 1 else f"{write.name}{i}@{t}"
                index, value = (i, float(values[t, i])) if self.ids is None else (self.ids[t], 1.0)
                columns.append(self._node(name, "token", write.name, t, index, value))
            self.at[write.name, t] = Source(self._long(columns), vectors)

    def constants(self, coders: Mapping[str, SparseCoder]) -> None:
        """Biases of layers and read-out, start vectors, and what was there before the window."""
        for block in self.local.network.blocks:
            if block.stem not in self.bias:
                self.bias[block.stem] = len(self.nodes)
                self.nodes.append(
                    FeatureNode(f"{block.stem}.bias", "bias", block.layer, block.stem, None, None, 1.0, 0)
                )
        self.bias["logits"] = len(self.nodes)
        layer = self.local.network.readout.layer
        self.nodes.append(FeatureNode("logits.bias", "bias", layer, "logits", None, None, 1.0, 0))
        for write in self.local.network.writes:
            if bool(self.local.weights.starts[write.name].any()):
                self.start[write.name] = self._node(f"{write.name}.start", "bias", write.name, None, None, 1.0)
            if self.first:
                step = self.first - 1
                self.before[write.name] = self._node(
                    f"{write.name}.before@{step}", "error", write.name, step, None, 1.0
                )

    def units(self, write: Write) -> None:
        """One node for each number of a write that is not 0."""
        values = self.local.values[write.name]
        eye = torch.eye(write.size).to(values)
        for t in self.steps:
            active = values[t].nonzero().flatten()
            columns = self._long(
                [self._node(f"{_unit(write, i)}@{t}", "unit", write.name, t, i, float(values[t, i]))
                 for i in active.tolist()]
            )  # fmt: skip
            self.at[write.name, t] = Source(columns, values[t, active], active)
            constants = values.new_zeros(len(active))
            self.rows.append(Rows(write.name, t, eye[active], constants, values[t, active], columns))

    def latents(self, write: Write, coder: SparseCoder, stem: str) -> None:
        """One node for each active latent, and one for what they leave; offsets go to the layer's biases."""
        values = self.local.values[write.name]
        found = coder.encode(values)
        if not bool(torch.isfinite(found).all()):
            raise OptionError(
                f"the dictionary at state.{write.name} gives latents that are not finite; check its weights"
            )
        error = values - coder.decode(found)[..., 0, :]
        for t in self.steps:
            active = found[t].nonzero().flatten()
            columns = [
                self._node(f"{write.name}.f{i}@{t}", "latent", write.name, t, i, float(found[t, i]))
                for i in active.tolist()
            ]
            rest = self._node(f"{write.name}.error@{t}", "error", write.name, t, None, 1.0)
            written = coder.W_dec[0, active] * found[t, active, None]
            vectors = torch.cat((written, error[t][None], coder.b_dec))
            self.at[write.name, t] = Source(self._long([*columns, rest, self.bias[stem]]), vectors)
            if columns:
                reads, constants = _slopes(coder, active)
                self.rows.append(Rows(write.name, t, reads, constants, found[t, active], self._long(columns)))

    def _long(self, columns: list[int]) -> Tensor:
        return torch.tensor(columns, dtype=torch.long, device=self.local.like.device)


def _unit(write: Write, i: int) -> str:
    """A number's name: its writer's, and which of its numbers if there are several."""
    name = f"{write.name}{i // write.width}" if write.n > 1 else write.name
    return name if write.width == 1 else f"{name}.{i % write.width}"


def _slopes(coder: SparseCoder, index: Tensor) -> tuple[Float[Tensor, "latent d"], Float[Tensor, " latent"]]:
    """Active latents as affine functions of the state: activation = state . vector + constant."""
    vectors, constants = coder.W_enc.T[index], coder.b_enc[index]
    if coder.r_mag is not None and coder.b_mag is not None:
        vectors, constants = vectors * coder.r_mag.exp()[index, None], coder.b_mag[index]
    return vectors, constants - vectors @ coder.b_dec[0] if coder.subtract_b_dec else constants
