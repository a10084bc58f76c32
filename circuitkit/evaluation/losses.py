"""Where a method loses to random, and why.

A method loses on a model where its AUROC is below 1/2, where a circuit of some size keeps less of the behaviour than
random circuits of that size do on average (what is above 1 counts as 1), or where it finds a circuit in a model that
has none. Every loss wants a reason in `REASONS`: one that somebody looked into, not a guess.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from circuitkit.evaluation.ground_truth import KNOWN_SIZE, RANDOM, Cell

TIE = 0.01  # differences of faithfulness up to this are the noise of twenty random circuits

_NO_WEIGHTS = (
    "it does not see what a reader reads of the stream: queries and keys with weights of zero get the share that "
    "values get (1 in the first block, where only the input has written) and are grown before edges into MLPs"
)
_NO_UNEMBEDDING = (
    "it does not see what the logits read of the stream: most of the stream is the input (a share of 0.55 to 0.91), so "
    "input->logits is grown, which has no effect, and takes a place that a link of the chain needs"
)
_WHOLE_HEADS = (
    "it scores components, so queries and keys with weights of zero score what their head's values score; and edges "
    "into the logits count codes, of which there are fewer than pairs of codes (means of 0.6 and 1.7, not 1.7 and 6.0)"
)
_BOTH_VALID = (
    "both inputs of a pair are valid, and the mean over positions forgets their order: most of the program shows no "
    "code on clean inputs alone ({}), and a0.h0's edges into the last head, which shows some, are taken for parts"
)

# method -> model -> reason
REASONS: dict[str, dict[str, str]] = {
    "atp-star-edges": {
        "induction/trained": "with two blocks, the one pass that counts for input->a0.h0<v> drops what flows back "
        "through block 1, and all of its effect goes there: 0.1 instead of 22, so the chain misses its first link",
    },
    "discrete-codes": {
        "modadd/half_trained_1layer": "it scores components, so a head's queries and keys score what its values score: "
        "the four edges taken are all of a0.h6, two of them its query and key, whose weights are zero",
        **dict.fromkeys(("modadd/three_layer", "modadd/two_layer"), _WHOLE_HEADS),
        "tracr/reverse": _BOTH_VALID.format("8 of 13 known edges score 0"),
        "tracr/sort_unique": _BOTH_VALID.format("5 of 10 known edges score 0"),
    },
    "information-flow-routes": {
        **dict.fromkeys(
            (
                "modadd/half_trained_1layer",
                "modadd/mixed_attention_1layer",
                "modadd/modelA_pizza_uniform_attention",
                "modadd/three_layer",
                "modadd/two_layer",
            ),
            _NO_WEIGHTS,
        ),
        **dict.fromkeys(("tracr/hist", "tracr/reverse", "tracr/sort_unique"), _NO_UNEMBEDDING),
    },
}


@dataclass(frozen=True)
class Loss:
    """One method on one model: what was lost, and the reason or None."""

    method: str
    model: str
    what: str
    reason: str | None


def losses(cells: Iterable[Cell]) -> list[Loss]:
    """Every loss to random among the cells, by method and model."""
    found = {(cell.method, cell.model): cell for cell in cells}
    out = []
    for (method, model), cell in sorted(found.items()):
        chance = found.get((RANDOM, model))
        if method == RANDOM or chance is None:
            continue
        what = "; ".join(_lost(cell, chance))
        if what:
            out.append(Loss(method, model, what, REASONS.get(method, {}).get(model)))
    return out


def _lost(cell: Cell, chance: Cell) -> list[str]:
    if cell.finds_a_circuit is not None:
        return ["finds a circuit where there is none"] if cell.finds_a_circuit else []
    lost = [f"AUROC {cell.auroc:.2f}"] if cell.auroc is not None and cell.auroc < 0.5 else []
    for size, random in chance.faithfulness.items():
        mine = cell.faithfulness.get(size)
        if mine is not None and random is not None and min(mine, 1.0) < min(random, 1.0) - TIE:
            where = "at the known size" if size == KNOWN_SIZE else f"at {size} %"
            lost.append(f"faithfulness {where} {mine:.2f}, random {random:.2f}")
    return lost
