"""SHIFT: a classifier that generalises better once the features that should not matter are ablated.

1 train a linear probe on the mean over positions of the stream, on data where label and spurious attribute coincide
2 rank features by their effect on the probe's signed logit, against zero
3 judge which of the strongest have nothing to do with the task
4 ablate these everywhere: set to zero
5 train the probe again, on what is left

The control does the same with single tokens' embeddings in place of features. Where it does as well, the features have
shown nothing that a list of words would not have.
Reference: Marks et al. 2024, arXiv:2403.19647.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.attribution import quadrature
from circuitkit.functional.metrics import Metric
from circuitkit.functional.norms import at_least_float32
from circuitkit.methods.node_effects import node_effects
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import hooked, keeper
from circuitkit.models.interventions import Intervention, intervening
from circuitkit.models.probed import probed
from circuitkit.result import NodeScores
from circuitkit.shapes import Tokens
from circuitkit.tasks.base import Batch, Task

Labels = Bool[Tensor, " example"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs of one length, with what is to be learned and what only goes along with it.

    Args:
        tokens: the inputs.
        label: the class.
        spurious: the other attribute.
    """

    tokens: Tokens
    label: Labels
    spurious: Labels


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of the mean stream behind a layer: positive means True."""

    layer: int
    weight: Float[Tensor, " d"]
    bias: float

    def __call__(self, x: Float[Tensor, "example d"]) -> Float[Tensor, " example"]:
        """The logit of each example."""
        return x @ self.weight + self.bias


@dataclass(frozen=True)
class Accuracy:
    """Of one probe on balanced examples.

    Args:
        label: share whose label it gives.
        spurious: share whose other attribute it gives; one half is chance.
        worst: smallest accuracy among the four groups of label and other attribute.
    """

    label: float
    spurious: float
    worst: float


@dataclass(frozen=True, eq=False)
class Shift:
    """What SHIFT did.

    Args:
        ranked: effect of each candidate on the signed logit.
        ablated: names of what was judged to be irrelevant.
        before: the probe as first trained.
        after: the same probe with these ablated.
        retrained: a probe trained with these ablated.
    """

    ranked: dict[str, float]
    ablated: tuple[str, ...]
    before: Accuracy
    after: Accuracy
    retrained: Accuracy


Judge = Callable[[list[str]], Sequence[str]]


def shift(
    model: Model, train: Examples, test: Examples, judge: Judge, *, layer: int, most: int = 20, steps: int = 10
) -> Shift:
    """Run SHIFT with the latents (or other writers) of a model as features.

    Args:
        model: with dictionaries spliced in up to the layer.
        train: examples whose label and other attribute coincide.
        test: balanced examples.
        judge: from the names of the strongest features, strongest first, to those that are irrelevant to the task.
        layer: the probe reads the stream behind this block.
        most: how many features are shown to the judge.
        steps: points of the path from zero.

    Raises:
        OptionError: if the judge names what it was not shown, or a group of examples is missing.
    """
    probe = train_probe(model, train, layer)
    effects = rank_features(model, probe, train, steps=steps)
    own = zip(model.graph.source_nodes, effects.rows, strict=False)
    latents = {name for node, name in own if node.kind == "latent"} or set(effects.rows) - {"input"}
    ranked = _strongest(
        {n: v for n, v in zip(effects.rows, effects.values[:, 0].tolist(), strict=True) if n in latents}
    )
    chosen = _judged(judge, list(ranked)[:most])
    return _measured(model, train, test, probe, ranked, chosen, lambda _e: [Intervention(name, 0.0) for name in chosen])


def embedding_control(
    model: Model, train: Examples, test: Examples, judge: Judge, *, layer: int, most: int = 20, steps: int = 10
) -> Shift:
    """The control of `shift`: tokens in place of features; a name is a token id written as text.

    Raises:
        OptionError: as `shift`.
    """
    probe = train_probe(model, train, layer)
    ranked = _strongest(_token_effects(model, probe, train, steps))
    chosen = _judged(judge, list(ranked)[:most])
    gone = torch.tensor([int(name) for name in chosen])

    def without(examples: Examples) -> list[Intervention]:
        kept = ~torch.isin(examples.tokens.cpu(), gone)
        return [Intervention("input", kept[..., None].float(), "scale")]

    return _measured(model, train, test, probe, ranked, chosen, without)


@torch.no_grad()
def mean_stream(
    model: Model, tokens: Tokens, layer: int, interventions: Sequence[Intervention] = ()
) -> Float[Tensor, "example d"]:
    """The mean over positions of the stream behind a block, under interventions. Raises OptionError for no layer."""
    short, seen = probed(model, layer, torch.zeros(model.width)), dict[int, Tensor]()
    with intervening(model, interventions), hooked([(short.wiring.final, keeper(seen, 0))]):
        model.module(tokens.to(model.device))
    return at_least_float32(seen[0]).mean(1)


def train_probe(
    model: Model, examples: Examples, layer: int, interventions: Sequence[Intervention] = (), *, decay: float = 1e-2
) -> Probe:
    """Logistic regression of the label on the mean stream, each direction of it scaled to unit variance.

    Args:
        decay: penalty on the squared norm of the scaled weights.

    Raises:
        OptionError: if all labels are the same, or for no such layer.
    """
    if examples.label.all() or not examples.label.any():
        raise OptionError("got examples of one label only, expected both")
    x = mean_stream(model, examples.tokens, layer, interventions).double()
    middle, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    scaled, y = (x - middle) / spread, examples.label.to(x)
    parameters = torch.zeros(x.shape[1] + 1, dtype=x.dtype, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = scaled @ parameters[:-1] + parameters[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y) + decay * parameters[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    weight = (parameters[:-1].detach() / spread).float()
    return Probe(layer, weight, float(parameters[-1].detach() - (middle.float() @ weight)))


def rank_features(model: Model, probe: Probe, examples: Examples, *, steps: int = 10) -> NodeScores:
    """Effect of every writer before the probe on its logit, with the sign of the label, against zero."""
    short = probed(model, probe.layer, probe.weight, probe.bias)
    return node_effects(short, _probe_task(examples), steps=steps, corrupt_value="zero", progress=False)


def _probe_task(examples: Examples) -> Task:
    n, length = examples.tokens.shape
    sign = (2.0 * examples.label.float() - 1)[:, None, None].expand(n, length, 1)
    unused = torch.full((n, length, 1), -1)
    everywhere = torch.arange(length).expand(n, -1)
    lengths = torch.full((n,), length)
    metric = Metric("signed-probe", lambda x, b: (x[..., 0] * b.target[..., 0]).mean(1), ("target",))
    batch = Batch(examples.tokens, examples.tokens, lengths, everywhere, unused, unused[..., :0], target=sign)
    return Task("probe", (batch,), metric)


def _token_effects(model: Model, probe: Probe, examples: Examples, steps: int) -> dict[str, float]:
    """Effect of each token's embedding, all its occurrences together, mean over examples."""
    short, task = probed(model, probe.layer, probe.weight, probe.bias), _probe_task(examples)
    batch, run = task.batches[0].to(model.device), short.record(examples.tokens)
    rows, total = torch.arange(run.batch, device=model.device), torch.zeros_like(run.inputs[0])
    for alpha, weight in zip(*quadrature("midpoint", steps), strict=True):
        with torch.enable_grad():
            x = (alpha * run.inputs[0]).requires_grad_()
            value = task.metric(short.logits(short.replay(run, 0, x, rows), batch.positions), batch).sum()
            total += weight * torch.autograd.grad(value, x)[0]
    worth = (run.inputs[0] * total).sum(-1).flatten()
    sums = worth.new_zeros(model.d_vocab).index_add(0, batch.clean.flatten(), worth) / run.batch
    return {str(i): float(sums[i]) for i in batch.clean.unique().tolist()}


def _strongest(effects: dict[str, float]) -> dict[str, float]:
    return dict(sorted(effects.items(), key=lambda item: -abs(item[1])))


def _judged(judge: Judge, shown: list[str]) -> tuple[str, ...]:
    chosen = tuple(judge(shown))
    unknown = sorted(set(chosen) - set(shown))
    if unknown:
        raise OptionError(f"the judge named {unknown[0]!r}, expected some of what it was shown: {', '.join(shown[:8])}")
    return chosen


def _measured(
    model: Model, train: Examples, test: Examples, probe: Probe, ranked: dict[str, float], chosen: tuple[str, ...],
    without: Callable[[Examples], list[Intervention]],
) -> Shift:  # fmt: skip
    again = train_probe(model, train, probe.layer, without(train))
    return Shift(
        ranked, chosen, accuracy(model, probe, test), accuracy(model, probe, test, without(test)),
        accuracy(model, again, test, without(test)),
    )  # fmt: skip


def accuracy(model: Model, probe: Probe, examples: Examples, interventions: Sequence[Intervention] = ()) -> Accuracy:
    """How often a probe gives the label and the other attribute. Raises OptionError if a group has no example."""
    said = (probe(mean_stream(model, examples.tokens, probe.layer, interventions)) > 0).cpu()
    right, group = said == examples.label.cpu(), 2 * examples.label.int().cpu() + examples.spurious.int().cpu()
    if len(group.unique()) < 4:
        raise OptionError("got examples without some pair of label and other attribute, expected all four groups")
    worst = min(float(right[group == g].float().mean()) for g in range(4))
    also = (said == examples.spurious.cpu()).float().mean()
    return Accuracy(float(right.float().mean()), float(also), worst)
