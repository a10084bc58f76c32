"""A recurrent stage with everything multiplicative held at one run's values: its writes are linear in what is left.

    vanilla   h = c (W x + U h' + b)                               c = act(a) / a, a secant
    GRU       h = (1 - z) n + z h',   n = c (W x + b + r (U h' + b'))
    LSTM      cell = f cell' + i c_g (W x + U h' + b),   h = o c_h cell

h' is the state one step before; gates z, r, i, f, o and secants c stay as they were. A stage of one slot needs no
form of its own: its secant is all there is. Those of circuitkit's own cells are in `recurrent_own_cells`.
Whatever a form says is tested on the run itself (`frozen_stage`), so a cell that computes something else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import UnsupportedModel
from circuitkit.models.recurrent.parts import Block, Stage

At = Mapping[str, Float[Tensor, "step _"]]
TOLERANCE = 1e-9  # of a write, relative to its largest number
TINY = 1e-6  # from 0, to tell the slope there


@dataclass(frozen=True, eq=False)
class Term:
    """What one slot, or one earlier write of the same stage, adds to a write: a linear map at every step.

    Args:
        write: what is added to.
        source: the slot's or the write's name.
        maps: one for each group of numbers; one step or one group stands for all of them.
        across: whether the maps of all steps are added up at every step (pooling over time).
    """

    write: str
    source: str
    maps: Float[Tensor, "step group out in"]
    across: bool = False

    def push(self, x: Float[Tensor, "step source"]) -> Float[Tensor, "step write"]:
        """What is added, from what the source holds at every step."""
        y = torch.einsum("tgoi,tgi->tgo", *self._matched(x, self.maps.shape[3])).flatten(1)
        return y.sum(0, keepdim=True).expand_as(y) if self.across else y

    def pull(self, g: Float[Tensor, "row step write"], steps: slice) -> Float[Tensor, "row step source"]:
        """The gradient at the source, from that at the write, at some steps."""
        if self.across:
            g = g.sum(1, keepdim=True).expand_as(g)
        maps = self.maps if len(self.maps) == 1 else self.maps[steps]
        if maps.shape[2:] == (1, 1):
            return g * maps[..., 0, 0]
        groups = g.unflatten(-1, (-1, maps.shape[2]))
        return torch.einsum("rtgo,tgoi->rtgi", groups, maps.expand(g.shape[1], groups.shape[2], -1, -1)).flatten(2)

    def _matched(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        groups = x.unflatten(-1, (-1, width))
        return self.maps.expand(len(x), groups.shape[1], -1, -1), groups


@dataclass(frozen=True, eq=False)
class Frozen:
    """A stage as a linear map.

    Args:
        terms: a write's terms may have earlier writes of the stage as their source.
        constants: for some writes, what they hold without any of these.
    """

    terms: tuple[Term, ...]
    constants: Mapping[str, Float[Tensor, "step _"]]


class Here:
    """A stage on one run, as forms see it: every site by its name within the stage.

    Args:
        block: that the stage is in.
        stage: which.
        seen: every site of the run.
        values: every write of the run.
    """

    def __init__(self, block: Block, stage: Stage, seen: At, values: At) -> None:
        self.stage, self.values = stage, values
        self.at = {site.removeprefix(f"{block.stem}."): x for site, x in seen.items()}
        self.writes = tuple(write.name for write in stage.writes)

    def __getitem__(self, site: str) -> Tensor:
        return self.at[site]

    def term(self, source: str, maps: Tensor, write: int = 0, *, across: bool = False) -> Term:
        """A term of one of the stage's writes; a factor for each number, or maps already."""
        maps = maps.expand(1, -1) if maps.dim() == 1 else maps
        return Term(self.writes[write], source, maps if maps.dim() == 4 else maps[..., None, None], across)

    def ones(self, slot: str) -> Tensor:
        """A factor of 1 for each number of a slot."""
        return self[f"{slot}_pre"].new_ones(1, self.stage.slot(slot).size)

    def probe(self, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the step shows where some slots hold given numbers and the others zeros."""
        seen: dict[str, Tensor] = {}

        def see(site: str, value: Tensor) -> Tensor:
            seen[site] = value
            return value

        like = next(iter(slots.values()))
        self.stage.step({s.name: slots.get(s.name, like.new_zeros(1, s.size)) for s in self.stage.slots}, see)
        return seen


Form = Callable[[Here], "tuple[list[Term], dict[str, Tensor]] | list[Term]"]
FORMS: dict[frozenset[str], Form] = {}


def frozen_form(*slots: str) -> Callable[[Form], Form]:
    """Register how stages with these slots are frozen."""

    def register(form: Form) -> Form:
        FORMS[frozenset(slots)] = form
        return form

    return register


def frozen_stage(block: Block, stage: Stage, seen: At, values: At) -> Frozen:
    """A stage as a linear map of its slots on one run.

    Args:
        block: that the stage is in.
        stage: which.
        seen: every site of the run by name.
        values: what the stage wrote.

    Raises:
        UnsupportedModel: if no form is known for the stage, or the form does not give what the stage wrote.
    """
    import circuitkit.features.recurrent_own_cells  # noqa: F401  (registers its forms)

    names = [slot.name for slot in stage.slots]
    form = FORMS.get(frozenset(names)) or next((form for fits, form in ALIKE if fits(block, names)), None)
    if form is None:
        raise UnsupportedModel(
            f"no frozen form is known for {block.stem}, which reads {', '.join(names)}; say how it is linear with a "
            "function under @circuitkit.features.recurrent_cells.frozen_form"
        )
    made = form(Here(block, stage, seen, values))
    terms, constants = made if isinstance(made, tuple) else (made, {})
    frozen = Frozen(tuple(terms), constants)
    _check(block, stage, frozen, seen, values)
    return frozen


def _check(block: Block, stage: Stage, frozen: Frozen, seen: At, values: At) -> None:
    slots = {s.name: seen[f"{block.stem}.{s.name}_pre" if s.name else f"{block.stem}.pre"] for s in stage.slots}
    for write in stage.writes:
        value = values[write.name]
        made = frozen.constants.get(write.name, torch.zeros_like(value))
        for term in frozen.terms:
            if term.write == write.name:
                made = made + term.push(slots[term.source] if term.source in slots else values[term.source])
        gap = float((made - value).abs().max() / value.abs().max().clamp(min=1e-30))
        if not gap <= TOLERANCE:
            raise UnsupportedModel(
                f"{write.name} is not linear in what it reads with its gates held fixed: relative gap {gap:.1e}, "
                f"expected at most {TOLERANCE:.0e}"
            )


def secant(pre: Tensor, value: Tensor, slope: float | Tensor) -> Tensor:
    """``value / pre`` for each number; the slope of the nonlinearity where ``pre`` is 0.

    >>> secant(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]), 1.0).tolist()
    [0.5, 1.0]
    """
    zero = pre == 0
    return torch.where(zero, torch.as_tensor(slope).to(pre), value / pre.masked_fill(zero, 1))


def _single(here: Here) -> tuple[list[Term], dict[str, Tensor]]:
    """Any function of each number: its value at 0 is a constant, the rest a secant."""
    (slot,), step = here.stage.slots, here.stage.step
    pre = here["pre" if not slot.name else f"{slot.name}_pre"]
    terms, constants = list[Term](), {}
    if any(write.size != slot.size for write in here.stage.writes):
        raise UnsupportedModel(f"{here.writes[0]} is no function of each number of its only slot, {slot.name!r}")
    near = TINY * (pre == 0)
    start, above, below = (step({slot.name: x}, lambda _, value: value) for x in (pre * 0, pre + near, pre - near))
    for number, name in enumerate(here.writes):
        value = here.values[name]
        # At a kink the two sides differ, and torch takes 0.
        right, left = (above[name] - value) / TINY, (value - below[name]) / TINY
        slope = (right + left) / 2 * ((right - left).abs() < 0.1)
        terms.append(here.term(slot.name, secant(pre, value - start[name], slope), number))
        if bool(start[name].any()):
            constants[name] = start[name]
    return terms, constants


def _pooling(here: Here) -> list[Term]:
    weight = here["weight"]
    return [
        here.term(f"value_{name.rpartition('.')[2]}", weight, number, across=True)
        for number, name in enumerate(here.writes)
    ]


def _convolution(here: Here) -> tuple[list[Term], dict[str, Tensor]]:
    taps = [slot.name for slot in here.stage.slots]
    bias = here.probe({taps[0]: torch.zeros_like(here.ones(taps[0]))})["conv"]
    ratio = secant(here["conv"], here["u"], 0.5)
    terms = [here.term(tap, ratio * (here.probe({tap: here.ones(tap)})["conv"] - bias)) for tap in taps]
    return terms, {here.writes[0]: ratio * bias}


# Forms of stages whose slots are not always the same.
ALIKE: tuple[tuple[Callable[[Block, list[str]], bool], Form], ...] = (
    (lambda block, slots: len(slots) == 1 and not block.across, _single),
    (lambda block, slots: block.across and "score" in slots, _pooling),
    (lambda _, slots: all(slot.startswith("tap") for slot in slots), _convolution),
)


@frozen_form("r", "z", "n", "hn", "carry")
def _gru(here: Here) -> list[Term]:
    kept = (1 - here["z"]) * secant(here["n_pre"] + here["r_hn"], here["n"], 1.0)
    return [here.term("n", kept), here.term("hn", kept * here["r"]), here.term("carry", here["z"])]


@frozen_form("i", "f", "g", "o", "carry")
def _lstm(here: Here) -> list[Term]:
    entering = here["i"] * secant(here["g_pre"], here["g"], 1.0)
    leaving = here["o"] * secant(here["c"], here["tanh_c"], 1.0)
    return [here.term("carry", here["f"]), here.term("g", entering), here.term(here.writes[0], leaving, 1)]


@frozen_form(*(f"{part}_{slot}" for part in ("enc", "dec") for slot in ("r", "z", "n", "hn")), "carry", "phase")
def _encoder_decoder(here: Here) -> list[Term]:
    terms, carried = list[Term](), torch.zeros_like(here["carry_pre"])
    for part, share in (("enc", 1 - here["phase_pre"]), ("dec", here["phase_pre"])):
        ratio = secant(here[f"{part}_n_pre"] + here[f"{part}_r_hn"], here[f"{part}_n"], 1.0)
        new = share * (1 - here[f"{part}_z"]) * ratio
        terms += [here.term(f"{part}_n", new), here.term(f"{part}_hn", new * here[f"{part}_r"])]
        carried = carried + share * here[f"{part}_z"]
    return [*terms, here.term("carry", carried)]


@frozen_form("drive", "carry")
def _rate(here: Here) -> list[Term]:
    shown = here.probe({slot: here.ones(slot) for slot in ("drive", "carry")})
    # The slope of tanh at 0; at ReLU's kink what passes adds up to 0 with any slope.
    rates = secant(here["h"], here["r"], 1.0)
    return [
        here.term("drive", shown["new"]), here.term("carry", shown["kept"]), here.term(here.writes[0], rates, 1),
    ]  # fmt: skip
