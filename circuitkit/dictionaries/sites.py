"""The tensors that a dictionary reads and writes, recorded from a running model.

resid-pre, resid-post   the stream before and after a block
attn-out                sum over heads of z W_O, plus bias, behind a post-norm if there is one
mlp-in                  what the MLP reads: norm(stream)
mlp-out                 what the MLP adds to the stream
z                       the heads' outputs before W_O, joined
state                   what a recurrent layer writes at every step
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.errors import OptionError

if TYPE_CHECKING:
    from circuitkit.models.hooked import Model
    from circuitkit.models.hooks import Hook
    from circuitkit.models.wiring import ReadSite, WriteSite


def activations(model: Model, site: Site, tokens: Tensor) -> Float[Tensor, "batch pos d"]:
    """What a model has at a site, at every position of every input.

    Args:
        model: a transformer or a recurrent network.
        site: where to look.
        tokens: token ids ``[batch, pos]`` (or the numbers that a recurrent network reads), without padding.

    Raises:
        OptionError: if the model has no such site.

    >>> from circuitkit.testing import tiny_model
    >>> activations(tiny_model(), Site("mlp-in", 0), torch.zeros(2, 5, dtype=torch.long)).shape[:2]
    torch.Size([2, 5])
    """
    return activations_at(model, (site,), tokens)[0]


def activations_at(model: Model, sites: Sequence[Site], tokens: Tensor) -> tuple[Float[Tensor, "batch pos _"], ...]:
    """What a model has at several sites, from one run. Raises OptionError if the model lacks one of them."""
    for site in sites:
        check_site(model, site)
    if model.family == "recurrent":
        traced = model.trace(tokens)  # type: ignore[attr-defined]
        return tuple(traced[site.name] for site in sites)
    from circuitkit.models.hooks import hooked, keeper

    seen: dict[int, Tensor] = {}
    hooks: list[Hook] = []
    for i, site in enumerate(sites):
        part = _part(model, site)
        if part is not None:
            read_through = site.kind == "mlp-in" and getattr(part, "weight", None) is not None
            port = part.stream if read_through else part.port  # type: ignore[union-attr]
            hooks.append((port, keeper(seen, i)))
    with hooked(hooks):
        run = model.record(tokens)
    with torch.no_grad():
        return tuple(_value(model, site, seen.get(i), run.inputs).detach() for i, site in enumerate(sites))


def check_site(model: Model, site: Site) -> None:
    """Refuse a site that the model does not have. Raises OptionError saying which it has."""
    if model.family == "recurrent":
        names = [write.name for write in model.network.writes]  # type: ignore[attr-defined]
        if site.kind != "state" or site.name not in names:
            known = ", ".join(f"state.{name}" for name in names)
            raise OptionError(f"{model.name} has no site {site}; it is recurrent and has {known}")
        return
    n = len(model.wiring.blocks)
    if site.kind == "state" or not 0 <= site.layer < n:
        raise OptionError(f"{model.name} has no site {site}; it is a transformer with layers 0 to {n - 1}")
    if not site.kind.startswith("resid") and _part(model, site) is None:
        raise OptionError(f"layer {site.layer} of {model.name} has no {site.kind}; choose another site")


def site_width(model: Model, site: Site) -> int:
    """How many numbers a site has at each position. Raises OptionError if the model does not have it."""
    check_site(model, site)
    if site.kind == "state":
        return next(w.size for w in model.network.writes if w.name == site.name)  # type: ignore[attr-defined]
    if site.kind != "z":
        return model.width
    part = _part(model, site)
    assert part is not None and part.weight is not None
    return part.weight.shape[0] * part.weight.shape[1]


def check_fits(dictionary: Dictionary, model: Model) -> None:
    """Refuse a dictionary that was made for another model, layer or width.

    Raises:
        OptionError: saying what does not fit.
    """
    for name, weight in dictionary.coder.named_parameters():
        if not bool(weight.isfinite().all()):
            raise OptionError(
                f"the dictionary at {dictionary.read} has NaN or infinite values in {name}; load it again"
            )
    # A module given in memory is named by its class, which says nothing about its weights.
    known = dictionary.model and not model.name.endswith(("LMHeadModel", "ForCausalLM"))
    if dictionary.model and not known:
        warnings.warn(
            f"the dictionary was trained on {dictionary.model!r}; whether {model.name} is that model cannot be told. "
            "Say so by circuitkit.load(module, name=...)",
            stacklevel=2,
        )
    if known and dictionary.model.rpartition("/")[2].lower() != model.name.rpartition("/")[2].lower():
        raise OptionError(
            f"the dictionary was trained on {dictionary.model!r}, and the model is {model.name!r}; if both are "
            f"the same weights, say so: dataclasses.replace(dictionary, model={model.name!r})"
        )
    for verb, site, width in (
        ("reads", dictionary.read, dictionary.coder.d_in),
        *(("writes", site, dictionary.coder.d_out) for site in dictionary.writes),
    ):
        have = site_width(model, site)
        if have != width:
            raise OptionError(f"the dictionary {verb} {width} numbers at {site}, where {model.name} has {have}")


def _part(model: Model, site: Site) -> WriteSite | ReadSite | None:
    """The wiring's part that holds a site's tensor; None for the stream, or if there is none."""
    sources, readers = model.graph.source_nodes, model.graph.destination_nodes
    if site.kind == "mlp-in":
        reads = (r for r in model.wiring.read_sites if r.block == site.layer)
        return next((r for r in reads if readers[r.first].kind in ("mlp", "neuron")), None)
    kinds = {"attn-out": ("head",), "z": ("head",), "mlp-out": ("mlp", "neuron")}.get(site.kind, ())
    return next((w for w in model.wiring.write_sites if w.block == site.layer and sources[w.first].kind in kinds), None)


def _value(
    model: Model, site: Site, seen: Tensor | None, inputs: tuple[Float[Tensor, "_ _ _"], ...]
) -> Float[Tensor, "batch pos d"]:
    if seen is None:
        return inputs[site.layer + (site.kind == "resid-post")]
    part = _part(model, site)
    assert part is not None
    seen = seen.flatten(2)
    if site.kind == "z" or part.weight is None:
        return seen
    if site.kind == "mlp-in":
        norm = part.norm  # type: ignore[union-attr]
        return seen if norm is None else norm(seen)
    written = seen @ part.weight.flatten(0, 1).to(seen.dtype)
    written = written if part.bias is None else written + part.bias.to(seen.dtype)
    post = part.post_norm  # type: ignore[union-attr]
    return written if post is None else post(written).to(seen.dtype)
