"""What latents read from the stream and write to it by weights alone, also through a chain of heads.

    r_j = P (gain * W_enc[:, j])                            P removes the mean where the norm does (layer norm)
    through a head:   r = P_a (gain_a * W_V^h W_O^h P_o (gain_o * r))        o: the norm behind attention, if any

A norm's gain and centring are weights and are folded in; its scale 1 / sigma belongs to one input and is left out, so
all of this holds up to a positive factor for each norm that is passed, the same for all that is read there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError
from circuitkit.features.places import attention_sites, check_dictionaries, check_model, mlp_sites
from circuitkit.functional.norms import Norm, at_least_float32
from circuitkit.models.hooked import Model

Heads = Sequence[tuple[int, int]]


def check_reader(model: Model, dictionary: Dictionary) -> None:
    """Whether a dictionary is a transcoder of this model.

    Raises:
        OptionError: for an SAE, or one that does not fit.
        UnsupportedModel: if the model's parts are not known.
    """
    check_model(model)
    check_dictionaries(model, [dictionary])
    if dictionary.read.kind != "mlp-in":
        raise OptionError(f"got a dictionary ({dictionary.kind}) that reads {dictionary.read}, expected a transcoder")


@torch.no_grad()
def read_vectors(
    model: Model, dictionary: Dictionary, latents: slice | list[int] = slice(None), through: Heads = ()
) -> Float[Tensor, "latent d"]:
    """What latents of a transcoder multiply the stream with, at the height of the first head or of their own layer.

    Args:
        model: the model.
        dictionary: a transcoder.
        latents: which of them.
        through: heads ``(layer, head)`` that the stream passes on the way to the latents, lowest first.

    Raises:
        OptionError: if heads are not there, not in order, or not below the latents.
    """
    check_heads(model, through, dictionary.read.layer)
    coder, found = dictionary.coder, mlp_sites(model.wiring, dictionary.read.layer)
    assert found is not None
    vectors = at_least_float32(coder.W_enc.detach()).T[latents]
    if coder.r_mag is not None:
        vectors = vectors * coder.r_mag.detach().exp()[latents, None].to(vectors)
    vectors = fold(found[0].norm, vectors)
    for layer, head in reversed(through):
        vectors = through_head(model, layer, head, vectors)
    return vectors


def through_head(model: Model, layer: int, head: int, vectors: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Vectors that read a head's output, as they read the stream that the head attends to."""
    found = attention_sites(model.wiring, layer)
    assert found is not None and found[0].weight is not None and found[1].weight is not None
    value, heads = found
    assert value.weight is not None and heads.weight is not None
    w_value, w_out = value.weight.detach()[head * value.n // heads.n], heads.weight.detach()[head]
    behind = fold(heads.post_norm, vectors)
    return fold(value.norm, behind @ w_out.to(behind).T @ w_value.to(behind).T)


def fold(norm: Norm | None, vectors: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Vectors behind a norm as they read the stream before it, up to 1 / sigma."""
    return vectors if norm is None else norm.fold(vectors)


def check_heads(model: Model, through: Heads, below: int) -> None:
    """Whether heads form a chain that ends below a layer's MLP. Raises OptionError saying which do not."""
    previous = -1
    for layer, head in through:
        found = attention_sites(model.wiring, layer) if 0 <= layer < len(model.wiring.blocks) else None
        if found is None or not 0 <= head < found[1].n:
            raise OptionError(f"got head {head} of layer {layer}, which {model.name} does not have")
        if layer <= previous:
            raise OptionError(f"got heads {tuple(through)}, expected them lowest first, one to a layer")
        previous = layer
    if through and previous > highest_head(model, below):
        raise OptionError(f"got a head of layer {previous}, expected one that the MLP of layer {below} can read")


def highest_head(model: Model, layer: int) -> int:
    """The highest layer whose heads a layer's MLP reads: its own, unless both read one stream."""
    mlp, attention = mlp_sites(model.wiring, layer), attention_sites(model.wiring, layer)
    parallel = mlp is not None and attention is not None and model.wiring.writes_before(mlp[0]) <= attention[1].first
    return layer - 1 if parallel else layer


@torch.no_grad()
def write_vectors(dictionary: Dictionary, before: int) -> Float[Tensor, "latent d"] | None:
    """What latents write to the stream below a layer, all sites of a CLT together; None if nothing."""
    numbers = [i for i, site in enumerate(dictionary.writes) if site.layer < before]
    if not numbers:
        return None
    return at_least_float32(dictionary.coder.W_dec.detach()[numbers]).sum(0)
