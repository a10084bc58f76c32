"""Training of SAEs, transcoders, skip transcoders and cross-layer transcoders, from tensors or from a model.

All are one task: of what is read at some sites, explain what is found at others, each with few latents. An SAE's target
is its input; a cross-layer transcoder is one coder for each site that is read, and coder i writes the i-th site and all
later ones, so that a site's target is the sum of what the coders up to it write.

    loss = FVU + sparsity / d * penalty + auxiliary terms         `circuitkit.dictionaries.losses`

Inputs and targets are scaled to variance 1 and the scale is folded into the weights at the end. Decoder rows (over all
sites that they write) have norm 1 throughout. Adam, a rate that rises and falls along a cosine, and a penalty that
rises over the first fifth of the steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.optimise import advance, begin, put
from circuitkit.dictionaries.recipe import Recipe
from circuitkit.dictionaries.sites import check_site, site_width
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.stream import ActivationStream, Batch
from circuitkit.dictionaries.training_state import COLUMNS, State, load_state, save_state
from circuitkit.dictionaries.units import from_units
from circuitkit.errors import FormatError, OptionError

if TYPE_CHECKING:
    from circuitkit.models.hooked import Model

SAVE_SECONDS = 30.0  # between two writes of the checkpoint
Pair = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Trained:
    """What training made.

    Args:
        coders: one, or one for each site that a cross-layer transcoder reads; frozen.
        history: a row for about every hundredth of the steps, columns as in ``columns``; numbers of that step's batch,
            in training units.
        dictionaries: the coders in their places, where these are known.
    """

    coders: tuple[SparseCoder, ...]
    history: Float[Tensor, "log column"]
    dictionaries: tuple[Dictionary, ...] = ()
    columns: tuple[str, ...] = COLUMNS

    @property
    def coder(self) -> SparseCoder:
        """The only coder. Raises OptionError if there are several."""
        return _only(self.coders)

    @property
    def dictionary(self) -> Dictionary:
        """The only dictionary. Raises OptionError if there are several, or sites are not known."""
        return _only(self.dictionaries)


def _only(items: tuple[Any, ...]) -> Any:
    if len(items) != 1:
        raise OptionError(f"there are {len(items)} of them, expected one; use .coders or .dictionaries")
    return items[0]


def train(
    recipe: Recipe,
    pairs: Iterable[Pair],
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Trained:
    """Train a dictionary on batches of tensors.

    Args:
        recipe: what is trained and how.
        pairs: batches, one for each step; gone through again where they can be. Each is a tensor ``[batch, d]`` (an
            SAE) or an input and a target: ``[batch, d_in]`` and ``[batch, d_out]`` (a transcoder), ``[batch, d_in]``
            and ``[batch, out, d_out]`` (one layer that writes several), or ``[batch, layer, d_in]`` and
            ``[batch, layer, d_out]`` (a cross-layer transcoder). The first sets the units.
        checkpoint: a file to go on from, written every half minute and when training breaks off; the batches must then
            come in the same order, and those already used are skipped.
        progress: show a bar if it takes more than 2 s.

    Raises:
        OptionError: for batches that do not fit together, are not finite or too few, or where training diverges.
        FormatError: if the checkpoint cannot be read or written.

    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> trained = train(Recipe(16, "topk", k=2, steps=3), [x])
    >>> trained.coder.W_enc.shape, trained.history.shape
    (torch.Size([8, 16]), torch.Size([3, 5]))
    """
    return _train(recipe, pairs, checkpoint, progress, {})


def train_on(
    model: Model,
    recipe: Recipe,
    tokens: Tensor | Iterable[Tensor],
    read: Site | tuple[Site, ...],
    writes: Site | tuple[Site, ...] | None = None,
    *,
    batch_size: int = 1024,
    buffer: int = 32768,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Trained:
    """Train a dictionary on a model's activations, streamed.

    Args:
        model: a transformer, or a recurrent network (sites of kind ``state``).
        recipe: what is trained and how.
        tokens: token ids ``[n, pos]``, or batches of them that can be gone through again; no padding.
        read: where it reads; several sites for a cross-layer transcoder.
        writes: where it writes; what it reads if None (an SAE). As many as are read for a cross-layer transcoder.
        batch_size: positions per step.
        buffer: positions that are shuffled together.
        checkpoint: as for `train`.
        progress: as for `train`.

    Raises:
        OptionError: if the model has no such site, and as for `train`.
        FormatError: as for `train`.

    >>> from circuitkit.testing import tiny_model
    >>> tokens = torch.randint(9, (8, 6), generator=torch.Generator().manual_seed(0))
    >>> recipe = Recipe(8, "topk", k=2, steps=2)
    >>> train_on(tiny_model(), recipe, tokens, Site("mlp-in", 0), Site("mlp-out", 0), batch_size=16).dictionary.kind
    'transcoder'
    """
    reads = (read,) if isinstance(read, Site) else tuple(read)
    written = reads if writes is None else (writes,) if isinstance(writes, Site) else tuple(writes)
    for site in (*reads, *written):
        check_site(model, site)
    for sites in (reads, written):
        widths = {site_width(model, site) for site in sites}
        if len(widths) != 1:
            raise OptionError(
                f"the sites {', '.join(map(str, sites))} have widths {sorted(widths)}; expected one width"
            )
    stream = ActivationStream(model, reads, written, tokens, batch_size, buffer, recipe.seed)
    about = {"sites": [*map(str, reads), *map(str, written)], "batch_size": batch_size, "buffer": buffer}
    trained = _train(recipe, stream, checkpoint, progress, about)
    last = dict(zip(COLUMNS, trained.history[-1].tolist(), strict=True))
    card = {"recipe": asdict(recipe), "batch_size": batch_size, "buffer": buffer, "last_step": last}
    return replace(
        trained,
        dictionaries=tuple(
            Dictionary(coder, reads[i], written[i:] if len(reads) > 1 else written, model.name, card)
            for i, coder in enumerate(trained.coders)
        ),
    )


def _train(
    recipe: Recipe,
    source: Iterable[Pair] | ActivationStream,
    checkpoint: str | Path | None,
    progress: bool,
    about: dict[str, Any],
) -> Trained:
    batches = _batches(source, 0)
    first = next(batches)
    coders, now = begin(recipe, *first, same=_is_same(source, first))
    run = asdict(recipe) | about | {"shapes": [list(first[0].shape), list(first[1].shape)]}
    if checkpoint:
        now = load_state(checkpoint, run, now)
    if now.step:
        batches = _batches(source, now.step)
        first = next(batches) if now.step < recipe.steps else first
    saved, batch = time.monotonic(), first
    try:
        with tqdm(
            total=recipe.steps, initial=now.step, desc="training", disable=not progress, delay=2, leave=False
        ) as bar:
            while now.step < recipe.steps:
                now = advance(recipe, coders, now, *batch)
                bar.update()
                if now.step < recipe.steps:
                    batch = next(batches)
                if checkpoint and time.monotonic() - saved > SAVE_SECONDS:
                    save_state(now, run, checkpoint)
                    saved = time.monotonic()
    except BaseException as error:
        _save_anyway(now, run, checkpoint, error)
        raise
    if checkpoint:
        save_state(now, run, checkpoint)
    put(coders, now)
    for i, coder in enumerate(coders):
        write = now.units.write[i:] if len(coders) > 1 else now.units.write
        from_units(coder.requires_grad_(False), float(now.units.read[i]), write)
    return Trained(coders, now.history)


def _batches(source: Iterable[Pair] | ActivationStream, step: int) -> Iterator[Batch]:
    """Batches from a step on, as ``[batch, read, d_in]`` and ``[batch, out, d_out]``."""
    if isinstance(source, ActivationStream):
        yield from source.from_step(step)
        return
    done = 0
    while True:
        before = done
        for pair in source:
            done += 1
            if done > step:
                yield _pair(pair, done)
        # An iterator that is used up gives nothing the second time.
        if done == before:
            raise OptionError(f"the batches ended after {done}; give more, or ones that can be gone through again")


def _pair(pair: Pair, number: int) -> Batch:
    x, y = pair if isinstance(pair, tuple) else (pair, pair)
    fits = x.dim() in (2, 3) and y.dim() in (2, 3) and len(x) == len(y) and len(x) > 1
    if not fits or (x.dim() == 3 and x.shape[:2] != y.shape[:2]):
        raise OptionError(
            f"batch {number} has inputs {list(x.shape)} and targets {list(y.shape)}; expected at least 2 rows "
            "of [batch, d_in] with [batch, d_out] or [batch, out, d_out], or [batch, layer, d_in] with "
            "[batch, layer, d_out]"
        )
    return (x if x.dim() == 3 else x[:, None]), (y if y.dim() == 3 else y[:, None])


def _is_same(source: Iterable[Pair] | ActivationStream, first: Batch) -> bool:
    if isinstance(source, ActivationStream):
        return len(source.reads) == 1 and tuple(source.reads) == tuple(source.writes)
    x, y = first
    return x.shape == y.shape and x.shape[1] == 1 and torch.equal(x, y)


def _save_anyway(now: State, run: dict[str, Any], checkpoint: str | Path | None, error: BaseException) -> None:
    """Keep the last whole step; what broke off stays the error that is raised."""
    if checkpoint:
        try:
            save_state(now, run, checkpoint)
        except FormatError as second:
            error.add_note(f"and the checkpoint could not be written: {second}")
        else:
            error.add_note(f"step {now.step} is kept in {checkpoint}; run again to go on")
