"""Replacing what a site holds at some steps of a recurrent run: a kick lasts one step, a clamp is held.

    a(t) <- a(t) + P (other(t) - a(t))    at the steps of the window;  P: some numbers, or a projection on a subspace

Afterwards the run goes on live, so an attractor may undo a kick; that it does is no evidence of irrelevance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.models.recurrent.parts import FEATURES
from circuitkit.models.recurrent.stepper import run_network

if TYPE_CHECKING:
    from circuitkit.models.recurrent.model import RecurrentModel


@dataclass(frozen=True, eq=False)
class SiteNodes:
    """The nodes of one site.

    Args:
        site: its name, as `RecurrentModel.trace` has it.
        names: of the nodes.
        projections: of each node, ``[node, number, number]``; or which numbers are its own, ``[node, number]``.
    """

    site: str
    names: tuple[str, ...]
    projections: Float[Tensor, "node number number"] | Float[Tensor, "node number"]


def site_nodes(model: RecurrentModel, site: str, *, each: bool) -> SiteNodes:
    """The nodes of a site: as a whole, or each by itself, as the model's view has them.

    Raises:
        OptionError: for a site that the network does not have.
    """
    sizes = site_sizes(model)
    if site not in sizes:
        raise OptionError(f"no site {site!r} in {model.name}; it has {', '.join(sizes)}")
    size = sizes[site]
    if not each:
        return SiteNodes(site, (site,), torch.ones(1, size))
    if site not in model.view.writer_of:  # a gate, or a summand: number by number
        return SiteNodes(site, tuple(f"{site}{i}" for i in range(size)), torch.eye(size))
    numbers, names = model.view.writer_of[site].unique(return_inverse=True)
    own = torch.nn.functional.one_hot(names, len(numbers)).T.float()
    labels = tuple(model.view.base.sources[i] for i in numbers.tolist())
    if site not in model.view.bases:
        return SiteNodes(site, labels, own)
    basis = model.view.bases[site].float()
    return SiteNodes(site, labels, torch.stack([(basis * row) @ basis.T for row in own]))


def site_sizes(model: RecurrentModel) -> dict[str, int]:
    """How many numbers every site holds at a step."""
    sizes: dict[str, int] = {}

    def note(site: str, value: Tensor, _step: int | None) -> Tensor:
        sizes[site] = value.shape[-1]
        return value

    like = next(p for p in model.module.parameters() if p.is_floating_point())
    x = like.new_zeros(1, 1, model.network.input.size)
    with torch.no_grad(), model.quiet():
        run_network(model.network, x, edit=note)
    return {site: size for site, size in sizes.items() if not site.startswith(f"{FEATURES}.")}


@dataclass(frozen=True, eq=False)
class Patches:
    """Patched runs on the batch axis.

    Args:
        site: what is replaced.
        projections: for each row, as in `SiteNodes`.
        values: what is put there, ``[row, step, number]``.
        first: first step of each row's window.
        stop: last step + 1.
    """

    site: str
    projections: Tensor
    values: Float[Tensor, "row step number"]
    first: Int[Tensor, " row"]
    stop: Int[Tensor, " row"]


def run_patched(
    model: RecurrentModel, x: Float[Tensor, "row step size"], patches: Patches
) -> tuple[Float[Tensor, "row step feature"], Float[Tensor, "row number"]]:
    """What the read-out reads in each patched run, and what the site held when its window ended."""
    held: dict[int, Tensor] = {}
    ends = torch.zeros_like(patches.values[:, 0])

    def edit(site: str, value: Tensor, step: int | None) -> Tensor:
        if site != patches.site:
            return value
        if step is None:
            return _replaced(patches, value, torch.arange(x.shape[1], device=x.device)[None, :], patches.values)
        value = value.expand_as(ends)
        new = _replaced(patches, value[:, None], torch.tensor([[step]], device=x.device), patches.values[:, step, None])
        held[step] = new[:, 0]
        return new[:, 0]

    with torch.no_grad(), model.quiet():
        features = run_network(model.network, x, edit=edit)[FEATURES]
    for step, value in held.items():
        ends = torch.where((patches.stop - 1 == step)[:, None], value, ends)
    return features, ends


def _replaced(patches: Patches, value: Tensor, steps: Tensor, other: Tensor) -> Tensor:
    """The site's value with the patch where its window covers the step."""
    gap = other - value
    if patches.projections.dim() == 3:
        gap = gap @ patches.projections.to(gap)
    else:
        gap = gap * patches.projections[:, None].to(gap)
    active = (steps >= patches.first[:, None]) & (steps < patches.stop[:, None])
    return value + gap * active[..., None]
