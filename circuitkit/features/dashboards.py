"""Feature dashboards: where a latent is active, how strongly, and which logits it moves.

    effect of latent i on logit t = sum over written sites  W_dec[i] . (gain of the final norm * W_U)[:, t],
                                    less its mean over the vocabulary

The final norm's own scale differs from run to run and is left out, so effects compare tokens, not models. Paths through
later layers are left out too.

Tokens are gone through twice, batch by batch: maxima and top examples first, then the histogram and examples of equal
parts of the range, which need the maximum. Memory does not grow with the number of texts.
Wrong where a latent matters through later layers, and about texts unlike those given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.sites import check_fits
from circuitkit.errors import OptionError
from circuitkit.features.direct_logits import strongest_logits
from circuitkit.features.latent_passes import First, Kept, Second, Source, first_pass, second_pass
from circuitkit.models.hooked import Model

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from circuitkit.dictionaries.base import Site

MOST_LOGITS = 10  # raised, and as many lowered


@dataclass(frozen=True)
class Example:
    """A stretch of a text around the place where a latent is strongest in that text.

    Args:
        tokens: ids; -1 where the model reads numbers.
        texts: of the tokens.
        activations: of the latent, at each token.
        at: which of them is the place.
        row: which text.
        position: of the place in its text.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    activations: tuple[float, ...]
    at: int
    row: int
    position: int


@dataclass(frozen=True)
class Histogram:
    """How often activations are in each bin; a bin holds its lower edge, the last one both."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Dashboard:
    """What is known of one latent.

    Args:
        latent: its number.
        site: what its dictionary reads, such as ``mlp-in.2``.
        layer: 0-based.
        activation_frequency: share of tokens on which it is active.
        act_min: smallest activation above 0; 0 if it is never active.
        act_max: largest activation.
        top: the texts in which it is strongest, one place of each.
        intervals: texts drawn at random from equal parts of 0 to ``act_max``, by each text's largest activation; the
            highest part first. None if it is never active.
        histogram: of all activations above 0.
        top_logits: tokens that it raises most, with the direct effect of an activation of 1; empty if there is no
            direct way to logits.
        bottom_logits: tokens that it lowers most, the strongest first.
    """

    latent: int
    site: str
    layer: int
    activation_frequency: float
    act_min: float
    act_max: float
    top: tuple[Example, ...]
    intervals: tuple[tuple[str, tuple[Example, ...]], ...]
    histogram: Histogram
    top_logits: tuple[tuple[str, float], ...]
    bottom_logits: tuple[tuple[str, float], ...]

    def plot(self) -> go.Figure:
        """Histogram, logits and the strongest example."""
        from circuitkit.figures.dashboard import dashboard_figure

        return dashboard_figure(self)


@torch.no_grad()
def dashboards(
    model: Model,
    dictionary: Dictionary,
    tokens: Tensor,
    latents: Sequence[int] | None = None,
    *,
    k: int = 10,
    window: int = 10,
    bins: int = 40,
    intervals: int = 5,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    budget: int | str | None = None,
) -> tuple[Dashboard, ...]:
    """A dashboard of each latent, from texts.

    Args:
        model: whose activations they are.
        dictionary: whose latents.
        tokens: token ids ``[n, pos]``, or what else the model reads, without padding.
        latents: which; None for all.
        k: examples at most.
        window: tokens shown on either side of an example's place.
        bins: of the histogram.
        intervals: into how many parts the range is cut.
        texts: of each token id; the tokenizer's, or ids without one, if None.
        seed: of the draws.
        budget: bytes of latents at a time, or text such as ``"1GiB"``; 256 MiB if None.

    Raises:
        OptionError: if the dictionary does not fit the model, a latent is not there, there are no tokens, or a size is
            below 1.

    >>> from circuitkit.dictionaries.base import Site
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> from circuitkit.testing import tiny_model
    >>> coder = SparseCoder(8, 4, 8).double().requires_grad_(False)
    >>> _ = coder.b_enc.fill_(1.0)
    >>> sae = Dictionary(coder, Site("resid-pre", 0), (Site("resid-pre", 0),))
    >>> board = dashboards(tiny_model(), sae, torch.zeros(3, 5, dtype=torch.long), [2])[0]
    >>> board.latent, board.activation_frequency, board.act_max, len(board.top)
    (2, 1.0, 1.0, 3)
    """
    for name, size in (("k", k), ("bins", bins), ("intervals", intervals)):
        if size < 1:
            raise OptionError(f"got {name} = {size}, expected at least 1")
    if window < 0 or tokens.dim() < 2 or not tokens.shape[0] * tokens.shape[1]:
        raise OptionError(f"got window = {window} and tokens {list(tokens.shape)}; expected 0 or more and [n, pos]")
    n = dictionary.coder.n_latents
    chosen = list(range(n)) if latents is None else [int(i) for i in latents]
    if bad := [i for i in chosen if not 0 <= i < n]:
        raise OptionError(f"got latent {bad[0]}, expected 0 to {n - 1}")
    if not chosen:
        return ()
    check_fits(dictionary, model)
    source = Source(model, dictionary, tokens, torch.tensor(chosen), budget)
    first = first_pass(source, k, window)
    second = second_pass(source, first, window, bins, intervals, seed)
    told = _told(model, texts)
    show = _Shown(tokens, window, told)
    ranked = strongest_logits(model, dictionary, torch.tensor(chosen), MOST_LOGITS)
    logits = [[tuple((told(token), value) for token, value in row) for row in rows] for rows in ranked]
    return tuple(
        _dashboard(i, latent, dictionary.read, first, second, show, (logits[0][i], logits[1][i]))
        for i, latent in enumerate(chosen)
    )


@dataclass(frozen=True, eq=False)
class _Shown:
    """Texts as examples show them."""

    tokens: Tensor
    window: int
    told: Callable[[int], str]

    def examples(self, kept: Kept, i: int) -> tuple[Example, ...]:
        """The kept texts of one latent."""
        some = kept.keys[i].isfinite()
        places = zip(kept.rows[i][some].tolist(), kept.places[i][some].tolist(), kept.windows[i][some], strict=True)
        return tuple(self._example(row, place, around) for row, place, around in places)

    def _example(self, row: int, place: int, around: Tensor) -> Example:
        start, end = max(0, place - self.window), min(self.tokens.shape[1], place + self.window + 1)
        skipped = start - (place - self.window)
        read = self.tokens[row, start:end]
        words = not read.is_floating_point()
        ids = tuple(read.tolist()) if words else (-1,) * len(read)
        said = [self.told(i) for i in ids] if words else [_number(x) for x in read]
        return Example(
            ids, tuple(said), tuple(around[skipped : skipped + end - start].tolist()), place - start, row, place
        )


def _number(x: Tensor) -> str:
    return "(" + ", ".join(f"{value:.2g}" for value in x.flatten()[:3].tolist()) + ") "


def _told(model: Model, texts: Sequence[str] | None) -> Callable[[int], str]:
    """The text of a token id."""
    tokenizer = model.tokenizer

    @cache
    def told(token: int) -> str:
        if texts is not None:
            return texts[token] if 0 <= token < len(texts) else str(token)
        if tokenizer is None:
            return f"{token} "
        piece = str(tokenizer.convert_ids_to_tokens([token])[0])
        # Decoding one piece alone would drop the blank before it.
        return piece.replace("▁", " ") if "▁" in piece else str(tokenizer.decode([token]))

    return told


def _dashboard(
    i: int, latent: int, site: Site, first: First, second: Second, show: _Shown,
    logits: Sequence[tuple[tuple[str, float], ...]],
) -> Dashboard:  # fmt: skip
    high, bins, parts = float(first.high[i]), second.counts.shape[1], len(second.drawn)
    names = [f"{high * j / parts:.3g} to {high * (j + 1) / parts:.3g}" for j in range(parts)]
    drawn = [(name, show.examples(kept, i)) for name, kept in zip(names, second.drawn, strict=True)]
    return Dashboard(
        latent=latent,
        site=str(site),
        layer=site.layer,
        activation_frequency=float(first.frequency[i]),
        act_min=float(first.low[i]),
        act_max=high,
        top=show.examples(first.top, i),
        intervals=tuple(reversed(drawn)) if high > 0 else (),
        histogram=Histogram(tuple(high * j / bins for j in range(bins + 1)), tuple(second.counts[i].tolist())),
        top_logits=logits[0],
        bottom_logits=logits[1],
    )
