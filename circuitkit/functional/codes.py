"""Discrete codes: which latent of a dictionary is strongest, and which codes only one of two sets of prompts shows.

    code(e, u)   = the strongest latent of what component u wrote on prompt e
    only(u)      = |codes of u on positive prompts that it has on no negative one|
    only(u, v)   = |pairs of codes of u and v that one positive prompt shows together and no negative one|
    seen         = the same over all prompts, whether positive or negative

Codes and pairs become whole numbers that carry their component with them, and one `torch.unique` counts those of many
components. So memory is what is there to count, not components x components x codes x codes.
Reference: O'Neill and Bui 2024, arXiv:2405.12522.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

KEYS_AT_ONCE = 2**21  # 16 MiB of keys, about five times that while they are sorted

Codes = Int[Tensor, "prompt component"]


class Tally(NamedTuple):
    """How many codes, or pairs of codes, each group has."""

    only: Int[Tensor, " group"]
    """those of positive prompts that no negative prompt has"""
    seen: Int[Tensor, " group"]
    """those of any prompt"""

    @property
    def share(self) -> Float[Tensor, " group"]:
        """Of what was seen, the share that only positive prompts have; between 0 and 1."""
        return self.only / self.seen.clamp(min=1)


def argmax_codes(latents: Float[Tensor, "*batch latent"]) -> Int[Tensor, "*batch"]:
    """The number of the strongest latent; the number of latents where none is active.

    Of several equally strong ones, torch decides.

    >>> argmax_codes(torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]))
    tensor([1, 3])
    """
    strongest, which = latents.max(-1)
    return which.where(strongest > 0, latents.shape[-1])


def unique_codes(positive: Codes, negative: Codes) -> Tally:
    """Of each component, the codes that only positive prompts have.

    >>> unique_codes(torch.tensor([[1, 4], [2, 4]]), torch.tensor([[2, 4], [3, 5]]))
    Tally(only=tensor([1, 0]), seen=tensor([3, 2]))
    """
    return _tally(positive, negative, _size(positive, negative))


def unique_pairs(
    positive: Codes, negative: Codes, pairs: Int[Tensor, "pair 2"], *, at_once: int = KEYS_AT_ONCE
) -> Tally:
    """Of each pair of components, the pairs of codes that only positive prompts show together.

    Args:
        pairs: columns of the codes.
        at_once: keys counted together, which bounds memory.

    >>> codes = torch.tensor([[1, 4], [2, 5]]), torch.tensor([[1, 5], [2, 4]])
    >>> unique_codes(*codes).only, unique_pairs(*codes, torch.tensor([[0, 1]])).only
    (tensor([0, 0]), tensor([2]))
    """
    size = _size(positive, negative)
    found = []
    for some in pairs.split(max(1, at_once // max(1, len(positive) + len(negative)))):
        first, second = some.T
        both = [side[:, first].long() * size + side[:, second] for side in (positive, negative)]
        found.append(_tally(both[0], both[1], size**2))
    none = positive.new_zeros(0, dtype=torch.long)
    return Tally(*(torch.cat([none, *parts]) for parts in zip(*found, strict=True))) if found else Tally(none, none)


def _size(positive: Codes, negative: Codes) -> int:
    return 1 + max((int(side.max()) for side in (positive, negative) if side.numel()), default=0)


def _tally(positive: Int[Tensor, "prompt group"], negative: Int[Tensor, "other group"], size: int) -> Tally:
    """Codes below ``size``, told apart by group: group * size + code."""
    n = positive.shape[1]
    group = size * torch.arange(n, device=positive.device)
    keys, which = torch.unique(torch.cat([positive, negative]) + group, return_inverse=True)
    elsewhere = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    elsewhere[which[len(positive) :].flatten()] = True
    owner = keys // size
    return Tally(torch.bincount(owner[~elsewhere], minlength=n), torch.bincount(owner, minlength=n))
