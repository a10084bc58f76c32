"""What a dictionary is: a `SparseCoder` with the place that it reads and the places that it writes.

SAE               reads and writes one site
transcoder        reads one site, writes another (an MLP's input and output)
CLT               reads one site, writes that kind of site in its own and all later layers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError

KINDS = ("resid-pre", "resid-post", "attn-out", "mlp-in", "mlp-out", "z", "state")


@dataclass(frozen=True)
class Site:
    """One tensor of a model that a dictionary reads or writes, ``[batch, pos, d]``.

    Args:
        kind: ``resid-pre``, ``resid-post``, ``attn-out``, ``mlp-in`` (as the MLP reads it, behind the norm),
            ``mlp-out``, ``z`` (heads joined, before the output map), or ``state`` of a recurrent network.
        layer: 0-based layer; for ``state`` the layer too.
        name: for ``state`` the write, such as ``l0.h``; "" otherwise.

    >>> str(Site("mlp-in", 2)), str(Site("state", 0, "l0.h")), Site.parse("mlp-in.2") == Site("mlp-in", 2)
    ('mlp-in.2', 'state.l0.h', True)
    """

    kind: str
    layer: int
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"got a site of kind {self.kind!r}, expected one of {', '.join(KINDS)}")

    def __str__(self) -> str:
        return f"{self.kind}.{self.name or self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site of a text that `str` made. Raises OptionError for any other."""
        kind, _, rest = str(text).partition(".")
        layer = rest[1:].partition(".")[0].rstrip("r")
        if kind == "state" and rest.startswith("l") and layer.isdigit():
            return cls(kind, int(layer), rest)
        if not rest.isdigit():
            raise OptionError(f"got site {text!r}, expected a kind and a layer, such as 'mlp-in.2' or 'state.l0.h'")
        return cls(kind, int(rest))


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse coder in its place.

    Args:
        coder: encoder, nonlinearity and decoder.
        read: where its input is found.
        writes: where its outputs go, in the order of the coder's decoders.
        model: name of the model that it was trained on, or "" if that is not known.
        card: recipe, measured numbers, source and licence; what belongs beside the weights.
    """

    coder: SparseCoder
    read: Site
    writes: tuple[Site, ...]
    model: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.writes) != self.coder.n_out:
            raise OptionError(f"got {len(self.writes)} sites to write to, and a coder with {self.coder.n_out} decoders")

    @property
    def kind(self) -> str:
        """``sae``, ``transcoder``, ``skip-transcoder`` or ``clt``."""
        if len(self.writes) > 1:
            return "clt"
        if self.writes[0] == self.read:
            return "sae"
        return "transcoder" if self.coder.W_skip is None else "skip-transcoder"
