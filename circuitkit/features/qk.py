"""Why a head looks where it looks: an attention score as a sum over pairs of features, one at each end.

    score[p, k] = sum over sources i, j of  (u_i Q)^T F (v_j K)

u_i is what source i put into the stream at the query's position p, v_j what source j put at the key's position k; each
through all frozen paths, so that what attention moved there counts for the source that it came from (or for the latent
of attention's output, where a dictionary has one). Q and K are the maps to query and key with this run's norm scales, F
is rotary positions and 1 / sqrt(d_head) (`circuitkit.features.scores`). All pairs are one matrix product. Biases and
errors are sources, so the pairs add up to the score before a soft cap; that is tested, relative gap at most 1e-4.

Wrong where norms matter: their scales are held, so a feature that only makes others smaller seems to do nothing. A
score is worth what it is beside the other scores of its query: what raises all of them alike moves nothing.
Cost: one forward pass, d_head / 16 replays of one block, one sweep with 2 d_head targets.
References: He et al. 2024, arXiv:2402.12201; Ge et al. 2024, arXiv:2405.13868. Deviations: positions, biases and errors
are sources; what attention moved is resolved into where it came from, instead of being left as one term of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.attribution import named
from circuitkit.features.explore import TOLERANCE, Table, column_stages, rows_of
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.local import LocalModel, Reads
from circuitkit.features.methods import feature_method
from circuitkit.features.replace import local_model
from circuitkit.features.scores import FrozenScore, frozen_score, with_score_sites
from circuitkit.features.texts import Text
from circuitkit.models.hooked import Model

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

AT_ONCE = 2**24  # pairs looked through together


@dataclass(frozen=True)
class Pair:
    """One term of a score: what a source at the query's end and one at the key's end make together."""

    query: FeatureNode
    key: FeatureNode
    weight: float


@dataclass(frozen=True, eq=False)
class QkAttribution:
    """One attention score, taken apart into pairs.

    Args:
        score: the score as a product, with its positions and the pattern there.
        nodes: the sources, in order of computation; all that reach one of the two positions.
        queries: what each put into the query, turned by F to where keys are.
        keys: what each put into the key.
        tokens: the prompt.
        model: name of the model.
        texts: the text of each token, if the model has a tokenizer.
    """

    score: FrozenScore
    nodes: tuple[FeatureNode, ...]
    queries: Float[Tensor, "node d_head"]
    keys: Float[Tensor, "node d_head"]
    tokens: Int[Tensor, " pos"]
    model: str = ""
    texts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        s = self.score
        where = f"a{s.layer}.h{s.head}, query {s.query.position}, key {s.key.position}"
        return f"QkAttribution({self.model}: {where}, score {s.product:.4g}, {len(self.nodes)} sources)"

    @property
    def pairs(self) -> Float[Tensor, "node node"]:
        """All terms: sources at the query's end down, at the key's end across. Grows with the square of sources."""
        return self.queries @ self.keys.T

    @property
    def by_query(self) -> Float[Tensor, " node"]:
        """What each source puts into the score through the query; adds up to the score."""
        return self.queries @ self.keys.sum(0)

    @property
    def by_key(self) -> Float[Tensor, " node"]:
        """What each source puts into the score through the key; adds up to the score."""
        return self.keys @ self.queries.sum(0)

    @property
    def slope(self) -> float:
        """How fast the attention moves with the score, the query's other scores as they are: A (1 - A).

        Under a soft cap c, times 1 - tanh(score / c)^2. A pair's weight times this is its effect on the attention, to
        first order.
        """
        s = self.score
        capped = 0.0 if s.soft_cap is None else float(torch.tanh(torch.tensor(s.product / s.soft_cap)))
        return s.attention * (1 - s.attention) * (1 - capped**2)

    def top(self, n: int = 20) -> tuple[Pair, ...]:
        """The ``n`` pairs of largest magnitude, strongest first. Raises OptionError if n is below 1."""
        if n < 1:
            raise OptionError(f"got n = {n}, expected at least 1")
        width = len(self.nodes)
        best, places = self.queries.new_zeros(0), torch.zeros(0, dtype=torch.long, device=self.queries.device)
        for rows in torch.arange(width, device=places.device).split(max(1, AT_ONCE // width)):
            weights = (self.queries[rows] @ self.keys.T).flatten()
            here = weights.abs().topk(min(n, len(weights))).indices
            best, places = torch.cat((best, weights[here])), torch.cat((places, here + rows[0] * width))
            order = best.abs().argsort(descending=True, stable=True)[:n]
            best, places = best[order], places[order]
        found = zip(best.tolist(), places.tolist(), strict=True)
        return tuple(Pair(self.nodes[at // width], self.nodes[at % width], w) for w, at in found if w)

    def to_pandas(self, n: int = 1000) -> pandas.DataFrame:
        """One row for each of the ``n`` strongest pairs: query, key, weight, and effect on the attention."""
        import pandas

        found = self.top(n)
        columns = {
            "query": [pair.query.name for pair in found],
            "key": [pair.key.name for pair in found],
            "weight": [pair.weight for pair in found],
            "attention_effect": [pair.weight * self.slope for pair in found],
        }
        return pandas.DataFrame(columns)

    @property
    def graph(self) -> FeatureGraph:
        """The marginals as a graph: every source with its effect through the query and through the key."""
        s = self.score
        finals = tuple(
            FeatureNode(
                f"score.a{s.layer}.h{s.head}[{s.query.position},{s.key.position}]<{slot}>@{read.position}", "score",
                s.layer, str(s.site), read.position, None, s.product, 1 + max(node.stage for node in self.nodes),
            )
            for slot, read in (("q", s.query), ("k", s.key))
        )  # fmt: skip
        effects = torch.stack((self.by_query, self.by_key))
        n = len(self.nodes)
        return FeatureGraph(
            (*self.nodes, *finals),
            torch.arange(n, n + 2, device=effects.device),
            torch.cat((effects, effects.new_zeros(2, 2)), 1),
            effects.new_full((2,), s.product),
            torch.cat((effects.new_zeros(n), effects.new_ones(2))).double(),
            self.tokens,
            self.model,
            self.texts,
        )

    def plot(self, n: int = 20) -> go.Figure:
        """The sources of the ``n`` strongest pairs: those of the query down, those of the key across."""
        from circuitkit.figures.qk import pair_heatmap

        return pair_heatmap(self, n)


@feature_method("qk-attribution")
def qk_attribution(
    model: Model,
    dictionaries: Sequence[Dictionary],
    tokens: Int[Tensor, " pos"] | str,
    *,
    layer: int,
    head: int,
    query: int = -1,
    key: int | None = None,
    frozen_mlps: bool = False,
) -> QkAttribution:
    """One attention score of a prompt as a sum over pairs of sources.

    Args:
        model: a transformer whose attention patterns can be reached; attributed in float32 if it is narrower.
        dictionaries: as for `circuitkit.features.attribution.attribution_graph`.
        tokens: the prompt, as token ids or as a text for the model's tokenizer.
        layer: of the head.
        head: number of the query head.
        query: position; negative counts from the end.
        key: position; None for the most attended one.
        frozen_mlps: let MLPs without a dictionary pass on what they read, as for attribution graphs.

    Raises:
        OptionError: if dictionaries or tokens do not fit, a layer, head or position is not there, or the query does not
            see the key.
        TaskError: if the prompt is a text and the model has no tokenizer.
        UnsupportedModel: if the model cannot be taken apart, or pairs do not add up to the score.

    >>> from circuitkit.testing import tiny_model
    >>> from circuitkit.dictionaries.base import Dictionary, Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> coder = SparseCoder(8, 16, 8).double().requires_grad_(False)
    >>> _ = [torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0)) for p in coder.parameters()]
    >>> transcoder = Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),))
    >>> found = qk_attribution(tiny_model(), [transcoder], torch.arange(5), layer=1, head=0, key=2)
    >>> abs(float(found.pairs.sum()) - found.score.product) < 1e-9
    True
    """
    text = Text.of(model, tokens)
    plain = local_model(model, dictionaries, text.tokens, frozen_mlps=frozen_mlps)
    score = frozen_score(model, plain, layer, head, query, key)
    local = with_score_sites(plain, [layer])
    unit = torch.eye(len(score.form), dtype=score.form.dtype, device=score.form.device)
    sides = score.query.reads(score.site, score.form.T), score.key.reads(score.site, unit)
    effects = rows_of(local, _table(sides)).effects.T
    queries, keys = effects[:, : len(unit)], effects[:, len(unit) :]
    reached = effects.any(1).nonzero().flatten()
    nodes = _nodes(local)
    found = QkAttribution(
        score, tuple(nodes[i] for i in reached.tolist()), queries[reached].contiguous(), keys[reached].contiguous(),
        local.tokens, model.name, text.of_each,
    )  # fmt: skip
    _check_sum(found)
    return found


def _table(sides: tuple[Reads, Reads]) -> Table:
    parts = zip(*((r.positions, r.vectors, r.constants, r.values) for r in sides), strict=True)
    reads = Reads(sides[0].site, *(torch.cat(part) for part in parts))
    return Table((reads,), torch.arange(len(reads), device=reads.positions.device))


def _nodes(local: LocalModel) -> list[FeatureNode]:
    stages = column_stages(local).tolist()
    return [node for group in local.nodes for node in named(group, stages)]


def _check_sum(found: QkAttribution) -> None:
    want, by_query = found.score.product, found.by_query.double()
    gap = abs(float(by_query.sum()) - want) / max(abs(want), float(by_query.abs().max()), 1e-30)
    if not gap <= TOLERANCE:
        raise UnsupportedModel(
            f"the pairs of layer {found.score.layer}, head {found.score.head} add up to {float(by_query.sum()):.6g}, "
            f"and the score is {want:.6g}: relative gap {gap:.1e}, expected at most {TOLERANCE:.0e}; load the model in "
            "float32 or float64"
        )
