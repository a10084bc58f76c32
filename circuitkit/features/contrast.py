"""Why this token and not that one: the difference of two logits as a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from circuitkit.errors import OptionError
from circuitkit.features.local import LocalModel, Reads
from circuitkit.features.targets import Final, Target, final_targets
from circuitkit.models.hooked import Model


@dataclass(frozen=True)
class Contrast:
    """The logit of one token less that of another, at the last position and before a soft cap.

    Args:
        right: token id, or a text of one token.
        wrong: the same.
        weight: how much it counts in influence.
    """

    right: int | str
    wrong: int | str
    weight: float = 1.0


def contrasted(label: str) -> tuple[int, int] | None:
    """The two token ids of a contrast's label; None for any other label.

    >>> contrasted("logits.7-12"), contrasted("direction")
    ((7, 12), None)
    """
    found = re.fullmatch(r"logits\.(\d+)-(\d+)", label)
    return (int(found[1]), int(found[2])) if found else None


def all_finals(model: Model, local: LocalModel, targets: Sequence[Target | Contrast] | None) -> list[Final]:
    """Targets as vectors, contrasts among them; see `circuitkit.features.targets.final_targets`."""
    if targets is None or not targets:
        return final_targets(model, local, None if targets is None else [])
    found = list[Final]()
    for _, some in groupby(targets, lambda target: isinstance(target, Contrast)):
        group = list(some)
        contrasts = [_contrast(model, local, target) for target in group if isinstance(target, Contrast)]
        found += contrasts or final_targets(model, local, plain(group))
    return found


def plain(targets: Sequence[Target | Contrast] | None) -> list[Target]:
    """Targets but for contrasts."""
    return [target for target in targets or () if not isinstance(target, Contrast)]


def _contrast(model: Model, local: LocalModel, target: Contrast) -> Final:
    assert isinstance(target.right, int) and isinstance(target.wrong, int), "texts have been read before"
    if target.right == target.wrong:
        raise OptionError(f"got a contrast of token {target.right} with itself, expected two tokens")
    right, wrong = (final.reads for final in final_targets(model, local, [target.right, target.wrong]))
    reads = Reads(
        right.site, right.positions, right.vectors - wrong.vectors, right.constants - wrong.constants,
        right.values - wrong.values,
    )  # fmt: skip
    return Final("direction", f"logits.{target.right}-{target.wrong}", target.weight, reads, -1)
