"""The model that a saved circuit of latents belongs to: its dictionaries, with the latents that it names as nodes."""

from __future__ import annotations

from collections.abc import Sequence

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.places import stem_of
from circuitkit.dictionaries.splice import splice
from circuitkit.errors import OptionError
from circuitkit.graph import Graph
from circuitkit.models.hooked import Model


def spliced_like(model: Model, dictionaries: Sequence[Dictionary], graph: Graph) -> Model:
    """The model with dictionaries spliced in, with the latents that a graph has; the model itself if it has none.

    Raises:
        OptionError: if the graph has latents of a layer for which no dictionary is given, or a dictionary has no
            latent in the graph.

    >>> import circuitkit as ck
    >>> from circuitkit.dictionaries.base import Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> model, site = ck.load("stories260k"), Site("mlp-out", 4)
    >>> sae = Dictionary(SparseCoder(64, 8, 64), site, (site,))
    >>> small = splice(model, sae, latents=[2, 5])
    >>> spliced_like(model, [sae], small.graph).graph.sources == small.graph.sources
    True
    """
    wanted = dict[str, list[int]]()
    for node in graph.source_nodes:
        if node.kind == "latent":
            stem, _, number = node.name.rpartition(".f")
            wanted.setdefault(stem, []).append(int(number))
    given = {stem_of(d.writes[0]): d for d in dictionaries}
    if missing := sorted(set(wanted) - set(given)):
        raise OptionError(
            f"the circuit has latents of {', '.join(missing)}, and no dictionary there is given; name it with "
            "--dictionary, in the order in which they were spliced"
        )
    if unused := sorted(set(given) - set(wanted)):
        raise OptionError(f"the circuit has no latents of {', '.join(unused)}; leave that dictionary out")
    for stem, dictionary in given.items():
        model = splice(model, dictionary, latents=wanted[stem])
    return model
