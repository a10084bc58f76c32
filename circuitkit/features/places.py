"""Whether dictionaries fit a model, and each other, before anything is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sites import check_fits
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.local import same_site
from circuitkit.models.hooked import Model
from circuitkit.models.wiring import ReadSite, Wiring, WriteSite

PAIRS = {
    "mlp-in": ("mlp-out",),
    "mlp-out": ("mlp-out",),
    "attn-out": ("attn-out",),
    "z": ("z",),
    "resid-pre": ("resid-pre", "resid-post"),
    "resid-post": ("resid-pre", "resid-post"),
}


def check_model(model: Model) -> None:
    """Whether a model's attention patterns and final norm are within reach, and its MLPs whole.

    Raises:
        UnsupportedModel: naming what is missing.
    """
    if model.family != "transformer":
        raise UnsupportedModel(f"{model.name} is {model.family}; attribution graphs are made of transformers")
    wiring = model.wiring
    if any(node.kind == "neuron" for node in wiring.graph.source_nodes):
        raise UnsupportedModel(f"the MLPs of {model.name} are split into neurons; pass the model with whole MLPs")
    if any(node.kind == "head" for node in wiring.graph.source_nodes) and len(wiring.patterns) != len(wiring.blocks):
        raise UnsupportedModel(f"the attention patterns of {model.name} cannot be reached, so they cannot be frozen")


def check_prompts(model: Model, prompts: Sequence[Tensor]) -> None:
    """Whether each prompt is a row of token ids that the model can read. Raises OptionError."""
    for tokens in prompts:
        if tokens.dim() != 1 or not 0 < len(tokens) <= model.n_ctx:
            raise OptionError(
                f"got tokens of shape {tuple(tokens.shape)}, expected one prompt of 1 to {model.n_ctx} tokens, the "
                f"context of {model.name}"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise OptionError(f"got tokens of {tokens.dtype}, expected token ids (int64)")
        if int(tokens.min()) < 0 or int(tokens.max()) >= model.d_vocab:
            raise OptionError(
                f"got token ids from {int(tokens.min())} to {int(tokens.max())}, {model.name} knows 0 to "
                f"{model.d_vocab - 1}"
            )


def attention_sites(wiring: Wiring, layer: int) -> tuple[ReadSite, WriteSite] | None:
    """Where a layer's values are read and its heads write; None without attention."""
    nodes = wiring.graph.destination_nodes
    value = next((r for r in wiring.read_sites if r.block == layer and nodes[r.first].slot == "v"), None)
    heads = next((w for w in wiring.write_sites if w.block == layer and _kind(wiring, w) == "head"), None)
    return None if value is None or heads is None else (value, heads)


def mlp_sites(wiring: Wiring, layer: int) -> tuple[ReadSite, WriteSite] | None:
    """Where a layer's MLP reads and writes; None without an MLP."""
    nodes = wiring.graph.destination_nodes
    read = next((r for r in wiring.read_sites if r.block == layer and nodes[r.first].kind == "mlp"), None)
    written = next((w for w in wiring.write_sites if w.block == layer and _kind(wiring, w) == "mlp"), None)
    return None if read is None or written is None else (read, written)


def _kind(wiring: Wiring, site: WriteSite) -> str:
    return wiring.graph.source_nodes[site.first].kind


def check_dictionaries(model: Model, dictionaries: Sequence[Dictionary]) -> None:
    """Whether every dictionary has its place in the model, and no place has two that exclude each other.

    Raises:
        OptionError: naming the dictionary's site, its width, and what the model has there.
    """
    if not dictionaries:
        raise OptionError(
            "got no dictionaries, expected at least one: without latents a graph has no features. Small ones ship: "
            "circuitkit list dictionaries, or circuitkit.dictionaries.zoo.dictionary_sets()"
        )
    for dictionary in dictionaries:
        _check_place(model, dictionary)
    reads = Counter(same_site(d.read) for d in dictionaries)
    if twice := [str(site) for site, n in reads.items() if n > 1]:
        raise OptionError(f"got two dictionaries that read {twice[0]}, expected one; leave one of them out")
    standing_in = {site: d.kind for d in dictionaries if d.read.kind == "mlp-in" for site in d.writes}
    for d in dictionaries:
        if d.read in standing_in:
            raise OptionError(f"got an SAE and a {standing_in[d.read]} that both write {d.read}; leave one of them out")


def _check_place(model: Model, dictionary: Dictionary) -> None:
    wiring, read = model.wiring, dictionary.read
    wrong = [w for w in dictionary.writes if w.kind not in PAIRS.get(read.kind, ())]
    if read.kind not in PAIRS or wrong:
        raise OptionError(
            f"got a dictionary from {read} to {', '.join(map(str, wrong or dictionary.writes))}; graphs are made of "
            "transcoders from mlp-in to mlp-out, and of SAEs on attn-out, z, mlp-out, resid-pre or resid-post"
        )
    early = [w for w in dictionary.writes if same_site(w).layer < same_site(read).layer]
    if early or (read.kind != "mlp-in" and same_site(dictionary.writes[0]) != same_site(read)):
        raise OptionError(f"got a dictionary from {read} to {dictionary.writes[0]}, which an SAE or CLT cannot have")
    if dictionary.coder.W_skip is not None and dictionary.writes[0] != Site("mlp-out", read.layer):
        raise OptionError(f"got a skip connection from {read} to {dictionary.writes[0]}, expected the same layer's MLP")
    heads = attention_sites(wiring, read.layer)
    if read.kind in ("z", "attn-out") and (heads is None or heads[1].weight is None):
        raise OptionError(
            f"got a dictionary at {read}, and layer {read.layer} of {model.name} has no heads to take apart"
        )
    check_fits(dictionary, model)
