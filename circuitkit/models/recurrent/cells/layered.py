"""What torch's own recurrent modules share: layers, directions, the names of weights, and vectors before step 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Described, Place
from circuitkit.models.recurrent.parts import Block, Getter, Link, Write


@dataclass(frozen=True, eq=False)
class Part:
    """One layer in one direction.

    Args:
        module: whose weights these are.
        suffix: of the weights' names: ``_l0``, ``_l0_reverse``, or nothing for a cell.
        layer: 0-based number in the network.
        reverse: whether time runs backward.
        sources: the writes that it reads.
        starts: fetch the vectors before the first step, by name (``h``, ``c``).
    """

    module: nn.Module
    suffix: str
    layer: int
    reverse: bool
    sources: tuple[Write, ...]
    starts: dict[str, Getter]

    @property
    def stem(self) -> str:
        """What the names of its nodes begin with."""
        return f"l{self.layer}r" if self.reverse else f"l{self.layer}"

    @property
    def size(self) -> int:
        """Units."""
        return int(self.module.hidden_size)  # type: ignore[arg-type]

    @property
    def output(self) -> int:
        """Numbers that it gives at each step."""
        return int(getattr(self.module, "proj_size", 0)) or self.size

    def name(self, site: str) -> str:
        """The name of a write."""
        return f"{self.stem}.{site}"

    def weight(self, kind: str) -> Getter:
        """A weight by reference: ``ih``, ``hh`` or ``hr``."""
        return lambda: getattr(self.module, f"weight_{kind}{self.suffix}")

    def projection(self) -> Getter | None:
        """The map from ``o tanh(c)`` to h, or None without ``proj_size``."""
        return self.weight("hr") if getattr(self.module, "proj_size", 0) else None

    def bias(self, gate: int = 0, kinds: tuple[str, ...] = ("ih", "hh")) -> Getter | None:
        """The sum of a gate's biases, or None."""
        if not self.module.bias:
            return None
        rows = slice(gate * self.size, (gate + 1) * self.size)
        return lambda: sum(getattr(self.module, f"bias_{kind}{self.suffix}")[rows] for kind in kinds)  # type: ignore[return-value]

    def input_links(self, slots: tuple[str, ...]) -> tuple[Link, ...]:
        """Links from what the layer below wrote, one for each source."""
        links, first = [], 0
        for write in self.sources:
            links.append(Link(write.name, slots, self._columns(slice(first, first + write.size))))
            first += write.size
        return tuple(links)

    def _columns(self, columns: slice) -> Getter:
        weight = self.weight("ih")
        return lambda: weight()[:, columns]

    def start(self, site: str) -> Getter | None:
        """The vector before the first step, or None for zeros."""
        return self.starts.get(site)


def stacked(module: Any, place: Place, block: Callable[[Part], Block], sites: tuple[str, ...]) -> Described:
    """Blocks of all layers and directions of a torch module."""
    sources, blocks = place.sources, list[Block]()
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        outputs = []
        for reverse in (False, True)[:directions]:
            suffix = f"_l{layer}" + "_reverse" * reverse
            starts = _starts(place.start, sites, directions * layer + reverse)
            part = Part(module, suffix, place.layer + layer, reverse, sources, starts)
            blocks.append(block(part))
            outputs.append(next(w for w in blocks[-1].writes if w.name == part.name("h")))
        sources = tuple(outputs)
    return Described(tuple(blocks), tuple(write.name for write in sources), module.num_layers)


def one_step(module: Any, place: Place, block: Callable[[Part], Block], sites: tuple[str, ...]) -> Described:
    """The block of a torch cell, which the user's code calls once per step."""
    part = Part(module, "", place.layer, False, place.sources, _starts(place.start, sites, None))
    return Described((block(part),), (part.name("h"),))


def _starts(start: Callable[[], Any] | None, sites: tuple[str, ...], index: int | None) -> dict[str, Getter]:
    """What fetches the vectors before step 0 of one layer, ``[size]`` each."""
    if start is None:
        return {}

    def fetch(number: int) -> Tensor:
        given = start()
        given = given if isinstance(given, tuple | list) else (given,)
        return given[number] if index is None else given[number][index]

    return {site: partial(fetch, number) for number, site in enumerate(sites)}
