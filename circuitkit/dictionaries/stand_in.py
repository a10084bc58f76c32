"""Dictionaries that stand in for what they explain: the model runs on their outputs, without any error term.

    y_l = sum over dictionaries that write l of  f W_dec[l] + b_dec[l] + x W_skip        f: latents of what is read now

What is read comes from the changed run, so that the mistakes of several dictionaries add up, as they would in a model
made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.places import place_of
from circuitkit.dictionaries.sites import check_fits
from circuitkit.errors import OptionError
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook, hooked
from circuitkit.models.wiring import Port


@contextmanager
def standing_in(model: Model, dictionaries: Sequence[Dictionary], *, silent: bool = False) -> Iterator[None]:
    """Inside, every run of the user's module writes what the dictionaries make of it; as found afterwards.

    Args:
        model: a transformer.
        dictionaries: SAEs of attention or MLP outputs, transcoders, or the layers of a cross-layer transcoder.
        silent: write zeros in their places instead.

    Raises:
        OptionError: if a dictionary does not fit the model, or writes to another kind of site.

    >>> import circuitkit as ck
    >>> from circuitkit.dictionaries.formats import load_dictionary
    >>> model, transcoder = ck.load("stories260k"), load_dictionary("stories260k/transcoders/2")
    >>> tokens = torch.tensor([[1, 403, 407]])
    >>> before = model.module(tokens)
    >>> with standing_in(model, [transcoder]):
    ...     after = model.module(tokens)
    >>> bool((before != after).any())
    True
    """
    made: dict[Site, list[Tensor]] = {}
    hooks: list[Hook] = []
    for dictionary in dictionaries:
        check_fits(dictionary, model)
        hooks.append((_port(model, dictionary, dictionary.read), _reader(dictionary, made)))
    writers = {site: dictionary for dictionary in dictionaries for site in dictionary.writes}
    for site, dictionary in writers.items():
        hooks.append((_port(model, dictionary, site), _writer(site, made, silent)))
    with torch.no_grad(), model.quiet(), hooked(hooks):
        yield


def recovered_together(model: Model, dictionaries: Sequence[Dictionary], score: Callable[[], float]) -> float:
    """How much of a score comes back when dictionaries stand in together for what they explain.

        recovered = (score with them - score with zeros) / (score of the model - score with zeros)

    Args:
        model: as for `standing_in`.
        dictionaries: as for `standing_in`.
        score: runs ``model.module`` and says how well it does: a logit difference, a cross-entropy.

    Raises:
        OptionError: if writing zeros changes nothing, so that there is nothing to recover; as `standing_in` besides.
    """
    with torch.no_grad(), model.quiet():
        clean = score()
    with standing_in(model, dictionaries, silent=True):
        zero = score()
    if clean == zero:
        raise OptionError("the score does not depend on these sites, so nothing can be recovered; choose another score")
    with standing_in(model, dictionaries):
        return (score() - zero) / (clean - zero)


def _reader(dictionary: Dictionary, made: dict[Site, list[Tensor]]) -> Callable[[Tensor], None]:
    def read(x: Tensor) -> None:
        written = dictionary.coder(at_least_float32(x).to(dictionary.coder.W_enc))
        for i, site in enumerate(dictionary.writes):
            made.setdefault(site, []).append(written[..., i, :])

    return read


def _writer(site: Site, made: dict[Site, list[Tensor]], silent: bool) -> Callable[[Tensor], Tensor]:
    def write(y: Tensor) -> Tensor:
        parts = made.pop(site)
        return torch.zeros_like(y) if silent else torch.stack(parts).sum(0).to(y)

    return write


def _port(model: Model, dictionary: Dictionary, site: Site) -> Port:
    """Where a site of a dictionary is read or replaced in a run."""
    if dictionary.kind == "sae":
        return place_of(model, dictionary).written
    nodes, readers = model.graph.source_nodes, model.graph.destination_nodes
    wiring = model.wiring
    reads = [r.port for r in wiring.read_sites if r.block == site.layer and readers[r.first].kind == "mlp"]
    writes = [w.port for w in wiring.write_sites if w.block == site.layer and nodes[w.first].kind == "mlp"]
    found = {"mlp-in": reads, "mlp-out": writes}.get(site.kind, [])
    if not found:
        raise OptionError(f"{model.name} has no whole MLP at {site} that a dictionary could stand in for")
    return found[0]
