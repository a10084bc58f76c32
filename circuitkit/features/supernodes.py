"""Groups of latents that do the same: found by what they get, what they give and what they write; and drawn as one.

    S[t, s] = A[t, s] / sum over s of |A[t, s]|                          signed shares of each target's input
    profile(i, j) = (cos(S[i, :], S[j, :]) + cos(S[:, i], S[:, j])) / 2  what they get, what they give
    similarity(i, j) = (profile(i, j) + cos(decoder_i, decoder_j)) / 2   profile alone where there is no decoder

Groups grow by complete link: the two whose least similar members are most similar become one, as long as these are at
least ``threshold`` similar, and as long as no path leads from the one out and back into the other: the graph of groups
has no cycles. The choice of similarity is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError
from circuitkit.features.graph import FeatureGraph
from circuitkit.features.local import same_site
from circuitkit.functional.influence import normalised_rows

Supernodes = tuple[tuple[str, tuple[str, ...]], ...]
MOST_LATENTS = 2000  # whose similarities are compared pair by pair


def supernodes(graph: FeatureGraph, dictionaries: Sequence[Dictionary] = (), *, threshold: float = 0.7) -> Supernodes:
    """Groups of two or more latents, as `circuitkit.exporters.graph_json.View` takes them.

    A group is called by its strongest member, how many more there are, and the token that all of them get most from if
    it is one.

    Args:
        graph: pruned, of one prompt or merged.
        dictionaries: those it was made with, so that decoders are compared too; without them profiles decide.
        threshold: the least similarity of two members, from -1 to 1.

    Raises:
        OptionError: for a threshold that is no cosine, or too many latents.
    """
    if not -1 <= threshold <= 1:
        raise OptionError(f"got threshold = {threshold}, expected a cosine from -1 to 1")
    latents = graph.kind("latent").nonzero().flatten()
    if len(latents) > MOST_LATENTS:
        raise OptionError(
            f"got a graph of {len(latents)} latents, expected at most {MOST_LATENTS}; prune it first: graph.prune()"
        )
    if not len(latents):
        return ()
    groups = complete_link(similarity(graph, latents, dictionaries), _edges(graph, latents), threshold)
    found = []
    for group in groups:
        members = latents[torch.tensor(group, device=latents.device)]
        ranked = members[graph.influence[members].argsort(descending=True, stable=True)].tolist()
        found.append((_label(graph, ranked), tuple(graph.nodes[i].name for i in ranked)))
    return tuple(found)


def similarity(
    graph: FeatureGraph, latents: Int[Tensor, " latent"], dictionaries: Sequence[Dictionary] = ()
) -> Float[Tensor, "latent latent"]:
    """How alike latents are, from -1 to 1; see the module's text."""
    shares = normalised_rows(graph.effects) * graph.effects.sign().double()
    row_of = torch.full((len(graph),), -1, device=latents.device)
    row_of[graph.targets] = torch.arange(len(graph.targets), device=latents.device)
    rows = row_of[latents]
    gets = torch.where((rows >= 0)[:, None], shares[rows], 0.0)
    profile = (_cosines(gets) + _cosines(shares[:, latents].T)) / 2
    decoders, known = _decoders(graph, latents, dictionaries)
    both = known[:, None] & (known[:, None] == known)
    return torch.where(both, (profile + _cosines(decoders)) / 2, profile) if len(dictionaries) else profile


def _cosines(x: Float[Tensor, "latent d"]) -> Float[Tensor, "latent latent"]:
    unit = normalize(x.double(), dim=1)
    return unit @ unit.T


def _decoders(
    graph: FeatureGraph, latents: Int[Tensor, " latent"], dictionaries: Sequence[Dictionary]
) -> tuple[Float[Tensor, "latent d"], Bool[Tensor, " latent"]]:
    """What each latent adds to the stream in all, where it writes there; and which ones do."""
    by_site = {str(same_site(d.read)): d for d in dictionaries if d.writes[0].kind != "z"}
    rows = []
    for i in latents.tolist():
        node = graph.nodes[i]
        dictionary = by_site.get(node.site.replace("resid-post", "resid-pre")) if node.index is not None else None
        rows.append(None if dictionary is None else dictionary.coder.W_dec[:, node.index].detach().sum(0).double())
    known = torch.tensor([row is not None for row in rows], device=latents.device)
    width = next((len(row) for row in rows if row is not None), 1)
    return torch.stack([torch.zeros(width).double() if row is None else row.cpu() for row in rows]).to(
        latents.device
    ), known


def _edges(graph: FeatureGraph, latents: Int[Tensor, " latent"]) -> Bool[Tensor, "latent latent"]:
    """Which latents (rows) give to which (columns)."""
    place = torch.full((len(graph),), -1, device=latents.device)
    place[latents] = torch.arange(len(latents), device=latents.device)
    rows = place[graph.targets] >= 0
    out = torch.zeros(len(latents), len(latents), dtype=torch.bool, device=latents.device)
    out[:, place[graph.targets[rows]]] = (graph.effects[rows][:, latents] != 0).T
    return out


def complete_link(
    alike: Float[Tensor, "item item"], edges: Bool[Tensor, "item item"], threshold: float
) -> list[list[int]]:
    """Groups of two or more items, none with two members less alike than a threshold, and none in a cycle of groups.

    >>> alike = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    >>> complete_link(alike, torch.zeros(3, 3, dtype=torch.bool), 0.5)
    [[0, 1]]
    """
    n, link = len(alike), alike.clone().fill_diagonal_(-torch.inf)
    reach, members = _closure(edges), {i: [i] for i in range(n)}
    while n > 1:
        a, b = divmod(int(link.argmax()), n)
        if not float(link[a, b]) >= threshold:
            break
        outside = torch.ones(n, dtype=torch.bool, device=alike.device)
        outside[[a, b]] = False
        if bool(((reach[a] & reach[:, b] | reach[b] & reach[:, a]) & outside).any()):
            link[a, b] = link[b, a] = -torch.inf
            continue
        members[a] += members.pop(b)
        least = torch.minimum(link[a], link[b])
        link[a], link[:, a] = least, least
        link[b], link[:, b], link[a, a] = -torch.inf, -torch.inf, -torch.inf
        out, back = reach[a] | reach[b], reach[:, a] | reach[:, b]
        out[[a, b]], back[[a, b]] = False, False
        reach[[a, b]], reach[:, [a, b]] = False, False
        reach[a], reach[:, a] = out, back
        reach |= back[:, None] & out
    return sorted(sorted(group) for group in members.values() if len(group) > 1)


def _closure(edges: Bool[Tensor, "item item"]) -> Bool[Tensor, "item item"]:
    """Which items can be reached from which."""
    reach = edges
    while True:
        steps = reach.float() @ reach.float() > 0
        more = reach | steps
        if torch.equal(more, reach):
            return more.clone()
        reach = more


def _label(graph: FeatureGraph, ranked: Sequence[int]) -> str:
    """Strongest member first; with the token that every member gets most from, if it is the same."""
    tokens = graph.kind("token").nonzero().flatten()
    row_of = {node: row for row, node in enumerate(graph.targets.tolist())}
    rows = [row_of[i] for i in ranked if i in row_of]
    name = f"{graph.nodes[ranked[0]].name} +{len(ranked) - 1}"
    if len(rows) < len(ranked) or not len(tokens):
        return name
    given = graph.effects[torch.tensor(rows, device=tokens.device)][:, tokens]
    strongest = {graph.nodes[int(tokens[i])].position or 0 for i in given.argmax(1).tolist()}
    if len(strongest) > 1 or not bool((given.amax(1) > 0).all()):
        return name
    place = strongest.pop()
    return f'{name} "{graph.texts[place] if graph.texts else int(graph.tokens[place])}"'
