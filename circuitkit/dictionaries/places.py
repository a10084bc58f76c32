"""Where in a model a dictionary can be spliced: the tensors of its sites, found in the wiring or by experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sites import check_fits
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model
from circuitkit.models.transformer import probe_tokens
from circuitkit.models.wiring import Port, ReadSite, WriteSite

INSTEAD = {
    "resid-pre": "it would stand for the whole stream, so that nothing written before could be read any more; use the "
    "SAEs of attn-out and mlp-out",
    "z": "its latents are written through each head's own map; use an SAE of attn-out",
    "mlp-in": "an SAE of what one reader reads writes nothing; use a transcoder, or an SAE of mlp-out",
    "state": "recurrent states are no writers of a transformer's stream",
}
INSTEAD["resid-post"] = INSTEAD["resid-pre"]


STEMS = {"attn-out": "a", "mlp-out": "m"}


def stem_of(site: Site) -> str:
    """How the latents spliced in at a site begin: ``a2`` of what attention writes in layer 2, ``m2`` of its MLP.

    >>> stem_of(Site("attn-out", 2)), stem_of(Site("mlp-out", 0))
    ('a2', 'm0')
    """
    return f"{STEMS.get(site.kind, site.kind)}{site.layer}"


@dataclass(frozen=True, eq=False)
class Place:
    """Where a dictionary is spliced in.

    Args:
        site: what it writes.
        write: the writers that its latents stand for.
        written: where their sum ``[batch, pos, d]`` is found, as it joins the stream.
        read: of a transcoder: the MLP's reader; None for an SAE, which reads what was written.
    """

    site: Site
    write: WriteSite
    written: Port
    read: ReadSite | None


def place_of(model: Model, dictionary: Dictionary) -> Place:
    """Where in the model a dictionary belongs.

    Raises:
        OptionError: if it is of another family, width or layer, of a site that cannot be spliced, or already spliced.
        UnsupportedModel: if no module gives what attention writes.
    """
    if model.family != "transformer":
        raise OptionError(f"dictionaries are spliced into transformers, and {model.name} is {model.family}")
    site = _written_site(dictionary)
    n = len(model.wiring.blocks)
    if not 0 <= site.layer < n:
        raise OptionError(f"got a dictionary for layer {site.layer}, and {model.name} has layers 0 to {n - 1}")
    kind, nodes = ("head" if site.kind == "attn-out" else "mlp"), model.graph.source_nodes
    own = [s for s in model.wiring.write_sites if s.block == site.layer and nodes[s.first].kind == kind]
    if not own:
        raise OptionError(
            f"layer {site.layer} of {model.name} has no whole {kind} to splice: it is already spliced or split, or the "
            "model has none"
        )
    check_fits(dictionary, model)
    if kind == "head":
        return Place(site, own[0], attention_output(model, own[0]), None)
    if dictionary.kind == "sae":
        return Place(site, own[0], own[0].port, None)
    readers = model.graph.destination_nodes
    read = next(s for s in model.wiring.read_sites if s.block == site.layer and readers[s.first].kind == "mlp")
    return Place(site, own[0], own[0].port, read)


def _written_site(dictionary: Dictionary) -> Site:
    """The one site that a dictionary writes. Raises OptionError for dictionaries that cannot be spliced, saying why."""
    read, writes = dictionary.read, dictionary.writes
    if len(writes) > 1:
        raise OptionError(
            "a cross-layer transcoder writes to many layers at once, so it is no writer of one site; use the method "
            "'attribution-graph', or one transcoder per layer"
        )
    if writes[0].kind in INSTEAD:
        raise OptionError(f"a dictionary that writes {writes[0]} cannot be spliced: {INSTEAD[writes[0].kind]}")
    if read != writes[0] and (read.kind, writes[0].kind, read.layer) != ("mlp-in", "mlp-out", writes[0].layer):
        raise OptionError(
            f"a dictionary that reads {read} and writes {writes[0]} cannot be spliced: expected one site, or mlp-in "
            "and mlp-out of one layer"
        )
    return writes[0]


@torch.no_grad()
def attention_output(model: Model, write: WriteSite) -> Port:
    """The last module of a block that gives what its heads write together; no wiring names it, so it is looked for.

    Raises:
        UnsupportedModel: if no module gives it.
    """
    run = model.record(probe_tokens(model.d_vocab, model.module)[:, : min(5, model.n_ctx)])
    block, found, z = model.wiring.blocks[write.block], list[tuple[nn.Module, Tensor]](), dict[str, Tensor]()

    def keep(module: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if isinstance(y, Tensor):
                found.append((module, y))

        return hook

    def keep_z(x: Tensor) -> None:
        z["z"] = x

    handles = [module.register_forward_hook(keep(module)) for module in block.modules()]
    try:
        rows = torch.arange(run.batch, device=run.inputs[0].device)
        model.replay_block(run, write.block, run.inputs[write.block], rows, [(write.port, keep_z)], Port(block))
    finally:
        for handle in handles:
            handle.remove()
    values = at_least_float32(z["z"].reshape(*z["z"].shape[:2], -1))
    assert write.weight is not None, "heads are written through a map"
    want = values @ write.weight.to(values.dtype).flatten(0, 1)
    want = want if write.bias is None else want + write.bias.to(want.dtype)
    want = want if write.post_norm is None else write.post_norm(want)
    for module, y in reversed(found):
        if sum(other is module for other, _ in found) > 1:  # dropout may be one module for attention and MLP
            continue
        if y.shape == want.shape and _close(at_least_float32(y), want, y.dtype):
            return Port(module)
    raise UnsupportedModel(
        f"no module of layer {write.block} of {model.name} gives what attention writes, so an SAE of attn-out cannot "
        "be spliced there"
    )


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype.itemsize >= 4 else 3e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))
