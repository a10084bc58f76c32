"""Shared by `discrete-codes` and `discrete-codes-nodes`: every writer's code on every input, by small autoencoders.

    x(e, u)    = what writer u adds to the stream on input e, mean over real positions
    code(e, u) = strongest latent of one autoencoder for all writers, trained on a few inputs

Means are kept as narrow as a head's z and expanded a few inputs at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.dictionaries.recipe import Recipe
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.train import train
from circuitkit.errors import OptionError
from circuitkit.functional.codes import Codes, argmax_codes
from circuitkit.functional.norms import at_least_float32
from circuitkit.methods.plan import Plan
from circuitkit.models.hooked import Model, Run
from circuitkit.tasks.base import Batch

LEARNING_RATE = 1e-3
Means = tuple[Float[Tensor, "prompt 1 node width"], ...]  # one for each write site


@dataclass(frozen=True)
class Coding:
    """How writers are coded.

    Args:
        latents: of each autoencoder.
        steps: of training, each on all that is trained on.
        sparsity: weight of the mean activation, beside the mean squared error.
        examples: inputs, clean and corrupt together, that each autoencoder is trained on.
        seeds: how many autoencoders, each with inputs and weights of its own.
    """

    latents: int
    steps: int
    sparsity: float
    examples: int
    seeds: int

    def __post_init__(self) -> None:
        for name in ("latents", "steps", "examples", "seeds"):
            if getattr(self, name) < 1:
                raise OptionError(f"got {name} = {getattr(self, name)!r}, expected a whole number of at least 1")
        if not 0 <= self.sparsity < math.inf:
            raise OptionError(f"got sparsity = {self.sparsity!r}, expected a number of at least 0")

    def recipe(self, d: int, seed: int) -> Recipe:
        """The same for the trainer, whose penalty is a sum of activations over the width ``d``; nothing is revived."""
        weight, never = self.sparsity * d / self.latents, self.steps + 1
        return Recipe(
            self.latents, sparsity=weight, steps=self.steps, lr=LEARNING_RATE, warm_up=0.0, dead_after=never, seed=seed
        )


def coded_writers(model: Model, mlps: bool) -> Bool[Tensor, " src"]:
    """Which writers get codes: all but the input and, unless asked for, parts of MLPs. Raises OptionError."""
    nodes = model.graph.source_nodes
    coded = torch.tensor([node.kind != "input" and (mlps or not node.name.startswith("m")) for node in nodes])
    if not coded.any():
        instead = "" if mlps else "; with mlps = True its MLPs are coded"
        raise OptionError(f"{model.name} has no heads, so there is nothing to code{instead}")
    return coded


def mean_writes(run: Run, batch: Batch) -> Means:
    """What every site wrote, as runs keep it, averaged over real positions."""
    real = torch.arange(batch.clean.shape[1], device=batch.clean.device) < batch.lengths[:, None]
    share = (real / batch.lengths[:, None])[..., None, None]
    return tuple((at_least_float32(w) * share).sum(1, keepdim=True) for w in run.writes)


def joined(parts: Sequence[Means]) -> Means:
    """The means of several chunks of inputs as one."""
    return tuple(torch.cat(site) for site in zip(*parts, strict=True))


def code_tables(
    model: Model, plan: Plan, positive: Means, negative: Means, coded: Bool[Tensor, " src"], coding: Coding
) -> Iterator[tuple[Codes, Codes]]:
    """Codes of positive and of negative inputs, by one autoencoder after the other.

    A column for each writer, and one for what has no code of its own: there, and for writers not coded, it is 0.

    Raises:
        OptionError: if the inputs that were drawn do not differ though others do.
    """
    n, both = len(positive[0]), tuple(torch.cat(pair) for pair in zip(positive, negative, strict=True))
    alike = all(bool((m == m[:1]).all()) for m in both)
    with plan.bar(coding.seeds, "autoencoders") as bar:
        for seed in range(plan.seed * coding.seeds, (plan.seed + 1) * coding.seeds):
            drawn = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))[: coding.examples]
            x = _expanded(model, both, drawn.to(both[0].device), coded).flatten(0, 1)
            if bool((x == x[:1]).all()):
                if not alike:
                    raise OptionError(
                        f"what was written on {len(drawn)} inputs does not vary, so nothing can be learned from it; "
                        f"give more examples than {coding.examples}, or another seed"
                    )
                coder = None
            else:
                coder = train(coding.recipe(x.shape[1], seed), [x], progress=False).coder
            yield _codes(model, plan, positive, coded, coder), _codes(model, plan, negative, coded, coder)
            bar.update()


def _expanded(
    model: Model, means: Means, rows: slice | Tensor, coded: Bool[Tensor, " src"]
) -> Float[Tensor, "row coded d"]:
    """What coded writers add to the stream, mean over positions."""
    parts = [site.expand(mean[rows])[:, :, 0] for site, mean in zip(model.wiring.write_sites, means, strict=True)]
    return torch.cat(parts)[coded.to(parts[0].device)].transpose(0, 1).float()


def _codes(model: Model, plan: Plan, means: Means, coded: Bool[Tensor, " src"], coder: SparseCoder | None) -> Codes:
    n = len(means[0])
    table = torch.zeros(n, len(coded) + 1, dtype=torch.long)
    if coder is None:
        return table
    size = plan.rows(4.0 * len(coded) * (2 * coder.d_in + 2 * coder.n_latents), model.device)
    for first in range(0, n, size):
        latents = coder.encode(_expanded(model, means, slice(first, first + size), coded))
        table[first : first + size, :-1][:, coded] = argmax_codes(latents).cpu()
    return table
