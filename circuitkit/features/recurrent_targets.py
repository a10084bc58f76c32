"""What the graph of a recurrent network explains: outputs, directions of a state, latents or units."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.sites import check_site
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.recurrent_local import FrozenRecurrence
from circuitkit.features.recurrent_sweep import Rows
from circuitkit.features.targets import MASS, MOST_LOGITS, Direction, Latent

LINEAR = 1e-4  # how far the read-out may lie from a linear map, relative to its largest output


@dataclass(frozen=True)
class Output:
    """One of the network's outputs at one step.

    Args:
        index: a token, a class, or which of the numbers that the network gives.
        position: the step; negative counts from the end.
    """

    index: int
    position: int = -1


RecurrentTarget = int | Output | Direction | Latent


@dataclass(frozen=True, eq=False)
class Final:
    """One target with its row.

    Args:
        name: of its node.
        kind: ``logit``, ``direction``, or ``latent`` for the node of a latent or a unit.
        site: the tensor that it reads.
        step: at which.
        index: of the output, or None.
        weight: how much it counts.
        shown: the number that its node shows.
        rows: a group of one.
    """

    name: str
    kind: str
    site: str
    step: int
    index: int | None
    weight: float
    shown: float
    rows: Rows


def final_targets(
    local: FrozenRecurrence, targets: Sequence[RecurrentTarget] | None, coded: Collection[str] = ()
) -> list[Final]:
    """Targets as rows; the last step's outputs if none are named.

    A network that reads tokens gives logits: they are taken minus their mean, count by their probability, and the
    likeliest up to a total of 0.95 (at most 10) are explained if none are named. Numbers are taken as they are and
    count alike, and the first 10 of them are explained. A `Latent` is a unit but in writes ``coded`` by a dictionary.

    Raises:
        OptionError: for an output, site or step that is not there.
        UnsupportedModel: if outputs are asked for and the read-out is not linear.
    """
    if targets is None:
        targets = _likeliest(local)
    if not targets:
        raise OptionError("got no targets, expected outputs, a Direction or a Latent, or None for the last outputs")
    wanted = [Output(t) if isinstance(t, int) else t for t in targets]
    return [_output(local, t) if isinstance(t, Output) else _inside(local, t, t.site.name in coded) for t in wanted]


def step_of(local: FrozenRecurrence, position: int) -> int:
    """A step counted from the beginning. Raises OptionError if there is none."""
    step = position if position >= 0 else local.steps + position
    if not 0 <= step < local.steps:
        raise OptionError(f"got a target at step {position} of an input of {local.steps} steps")
    return step


def _features(local: FrozenRecurrence) -> Float[Tensor, "step feature"]:
    return torch.cat([local.values[name] for name in local.network.features], -1)


def _outputs(
    local: FrozenRecurrence, features: Float[Tensor, "*row step feature"], step: int
) -> Float[Tensor, "*row out"]:
    """The outputs at a step, in the dtype of the frozen run."""
    like = next(local.model.module.parameters())
    rows = features.flatten(0, -3) if features.dim() > 2 else features[None]
    found = local.model.logits(rows.to(like), torch.full((len(rows), 1), step, device=features.device))[:, 0]
    return found.to(features).reshape(*features.shape[:-2], -1)


def values_of(
    local: FrozenRecurrence, final: Final, values: Mapping[str, Float[Tensor, "row step _"]]
) -> Float[Tensor, " row"]:
    """A target's number in other runs of the network, from what was written there."""
    if final.site == "logits":
        assert final.index is not None
        found = _outputs(local, torch.cat([values[name] for name in local.network.features], -1), final.step)
        logit = _is_logit(local, found.shape[-1])
        return found[:, final.index] - found.mean(1) if logit else found[:, final.index]
    return values[final.rows.write][:, final.step] @ final.rows.vectors[0] + final.rows.constants[0]


def _is_logit(local: FrozenRecurrence, n: int) -> bool:
    return local.model.numbers is None and n > 1


def _likeliest(local: FrozenRecurrence) -> list[RecurrentTarget]:
    found = _outputs(local, _features(local), local.steps - 1)
    if not _is_logit(local, len(found)):
        return [Output(i) for i in range(min(len(found), MOST_LOGITS))]
    chosen = found.double().softmax(0).sort(descending=True)
    count = min(int((chosen.values.cumsum(0) < MASS).sum()) + 1, MOST_LOGITS, len(found))
    return [Output(i) for i in chosen.indices[:count].tolist()]


def _output(local: FrozenRecurrence, target: Output) -> Final:
    step = step_of(local, target.position)
    features = _features(local)
    with torch.enable_grad():
        x = features.clone().requires_grad_()
        found = _outputs(local, x, step)
        if not 0 <= target.index < len(found):
            raise OptionError(f"got output {target.index} as a target, expected 0 to {len(found) - 1}")
        logit = _is_logit(local, len(found))
        total = found[target.index] - found.mean() if logit else found[target.index]
        (slope,) = torch.autograd.grad(total, x)
    with torch.no_grad():
        at_zero, doubled, turned = (_outputs(local, y, step) for y in (features * 0, features * 2, -features))
        found, total = found.detach(), total.detach()
        gap = max(float((y - at_zero - k * (found - at_zero)).abs().max()) for y, k in ((doubled, 2), (turned, -1)))
        if not gap <= LINEAR * float(
            torch.stack([x.abs().max() for x in (found, at_zero, doubled)]).max().clamp(1e-30)
        ):
            raise UnsupportedModel(
                f"the read-out of {local.model.name} is not linear in what it reads; name a Direction on a state as "
                "target instead"
            )
        constant = at_zero[target.index] - at_zero.mean() if logit else at_zero[target.index]
        sizes = [local.network.write(name).size for name in local.network.features]
        parts = dict[str, Tensor]()
        for name, part in zip(local.network.features, slope[None].split(sizes, -1), strict=True):
            parts[name] = parts[name] + part if name in parts else part
        probability = float(found.double().softmax(0)[target.index])
    rows = Rows("", step, slope[:0].sum(0)[None], constant[None], total[None], torch.tensor([-1]), parts)
    shown, weight = (probability, probability) if logit else (float(total), 1.0)
    kind = "logit" if logit else "direction"
    name = f"logits.{target.index}@{step}"
    return Final(name, kind, "logits", step, target.index, weight, shown, rows)


def _inside(local: FrozenRecurrence, target: Direction | Latent, coded: bool) -> Final:
    check_site(local.model, target.site)
    name, step = target.site.name, step_of(local, target.position)
    value = local.values[name][step]
    if name == local.network.input.name:
        raise OptionError(f"got a target at {target.site}, the input, behind which there is nothing")
    none = value.new_zeros(1)
    if isinstance(target, Latent):
        if not 0 <= target.index < len(value) and not coded:
            raise OptionError(f"got unit {target.index} of {target.site}, which has units 0 to {len(value) - 1}")
        # Of a dictionary's latent the node's own row takes the place of this one.
        vector = torch.zeros_like(value) if coded else torch.eye(len(value)).to(value)[target.index]
        rows = Rows(name, step, vector[None], none, (value @ vector)[None], torch.tensor([-1]))
        return Final(f"{name}.{target.index}@{step}", "latent", str(target.site), step, target.index, 1.0, 0.0, rows)
    if tuple(target.vector.shape) != tuple(value.shape):
        raise OptionError(
            f"got a direction of shape {tuple(target.vector.shape)} at {target.site}, expected ({len(value)},)"
        )
    vector = target.vector.to(value)
    total = value @ vector
    rows = Rows(name, step, vector[None], none, total[None], torch.tensor([-1]))
    return Final(f"{target.label}@{step}", "direction", str(target.site), step, None, target.weight, float(total), rows)
