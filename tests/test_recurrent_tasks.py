"""What the tasks for recurrent networks state, and that the networks of the zoo do it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import circuitkit as ck
from circuitkit.errors import OptionError, TaskError
from circuitkit.models.recurrent.zoo import build, recurrent_names
from circuitkit.tasks.base import Batch, Task, make
from circuitkit.tasks.silent_letters import STEMS
from tests.stub_models import StubModel, recurrent, zoo

CELLS = ("tanh", "gru", "lstm")
# Task, network, least share of pairs whose metric falls, and least mean metric on clean inputs.
RUNS = (
    *[("flip-flop", f"toys/flip-flop_{cell}_s{seed}", 1.0, 0.95) for cell in CELLS for seed in range(3)],
    *[("parity", f"toys/parity_{cell}_s{seed}", 1.0, 5.0) for cell in CELLS for seed in range(3)],
    *[("integrator", f"toys/integrator_{cell}_s{seed}", 1.0, 0.1) for cell in CELLS for seed in range(3)],
    ("parity", "toys/parity_signed_s0", 1.0, 5.0),
    ("second-largest", "second-largest/length_2", 1.0, 0.1),
    ("second-largest", "second-largest/length_3", 0.99, 0.1),
    ("silent-letters", "g2p/gru", 1.0, 3.0),
    ("c-before-e", "g2p/gru", 1.0, 3.0),
    ("next-character", "charlm/lstm", 1.0, 3.0),
    ("word-break", "word-breaks/thai_h15", 1.0, 1.0),
    ("word-break", "word-breaks/thai_h27", 1.0, 1.0),
    ("stimulus-phase", "phase-memory/full_rank_n100", 1.0, 0.45),
    ("stimulus-phase", "phase-memory/rank1_n512", 1.0, 0.45),
    ("two-choice", "2afc/rnn", 1.0, 0.1),
)


@cache
def net(name: str) -> nn.Module:
    return build(name)[0]


@torch.no_grad()
def outputs(name: str, batch: Batch, inputs: Tensor) -> Tensor:
    every = net(name)(inputs)
    return every.gather(1, batch.positions[..., None].expand(-1, -1, every.shape[-1]))


def measured(task: Task, name: str) -> tuple[Tensor, Tensor]:
    """The metric of every pair, clean and corrupt."""
    both = ("clean", "corrupt")
    parts = [[task.metric(outputs(name, b, getattr(b, side)), b) for b in task.batches] for side in both]
    return torch.cat(parts[0]), torch.cat(parts[1])


@pytest.mark.parametrize("task, name, share, least", RUNS, ids=[f"{run[0]}-{run[1]}" for run in RUNS])
def test_the_corrupt_input_lowers_the_metric(task: str, name: str, share: float, least: float) -> None:
    clean, corrupt = measured(make(task, recurrent(name), n=64), name)
    assert float((clean > corrupt).double().mean()) >= share
    assert float(clean.mean()) >= least and float(corrupt.mean()) <= (least / 2 if task == "integrator" else 0.0)


def test_every_network_that_can_do_a_task_is_run() -> None:
    cannot = {"toys/parity_nonnegative_s0", "phase-memory/rank1_linear_readout_fails", "word-breaks/burmese_h27"}
    assert {name for _, name, *_ in RUNS} == set(recurrent_names()) - cannot


def test_networks_that_cannot_do_a_task_do_not() -> None:
    clean, _ = measured(make("parity", recurrent("toys/parity_nonnegative_s0"), n=64), "toys/parity_nonnegative_s0")
    assert float((clean > 0).double().mean()) == pytest.approx(0.5, abs=0.15)
    name = "phase-memory/rank1_linear_readout_fails"
    clean, _ = measured(make("stimulus-phase", recurrent(name), n=64), name)
    assert float(clean.mean()) < 0.2


def changed(batch: Batch) -> Tensor:
    return (batch.clean != batch.corrupt).nonzero()


@pytest.mark.parametrize("bit", [0, 1, 2])
def test_flip_flop_pairs_differ_in_one_pulse(bit: int) -> None:
    (batch,) = make("flip-flop", recurrent("toys/flip-flop_gru_s0"), n=50, bit=bit).batches
    assert changed(batch).tolist() == [[i, 0, bit] for i in range(50)]
    assert (batch.clean[:, 0].abs() == 1).all() and (batch.clean[:, 1:, bit] == 0).all()
    assert batch.clean[:, 1:].any() and set(batch.clean.flatten().tolist()) == {-1.0, 0.0, 1.0}
    assert (batch.positions == 11).all()
    others = [k for k in range(3) if k != bit]
    assert torch.equal(batch.target[:, 0, bit], batch.clean[:, 0, bit]) and not batch.target[:, 0, others].any()


def test_parity_pairs_differ_in_one_bit_and_the_answer() -> None:
    (batch,) = make("parity", recurrent("toys/parity_lstm_s0"), n=200, length=7).batches
    assert changed(batch)[:, 0].tolist() == list(range(200))
    assert set(changed(batch)[:, 1].tolist()) == set(range(7))
    for side, answer in ((batch.clean, batch.right), (batch.corrupt, batch.wrong)):
        assert [sum(row) % 2 for row in side.tolist()] == answer.flatten().tolist()
    with pytest.raises(TaskError, match="distinct pairs"):
        make("parity", recurrent("toys/parity_lstm_s0"), n=9, length=2)


def test_integrator_pairs_differ_in_the_first_pulse() -> None:
    (batch,) = make("integrator", recurrent("toys/integrator_gru_s0"), n=50).batches
    assert changed(batch).tolist() == [[i, 0, 0] for i in range(50)]
    assert torch.equal(batch.clean[:, 0], -batch.corrupt[:, 0])
    assert torch.equal(batch.target[:, 0], batch.clean[:, 0])


@pytest.mark.parametrize("length", [2, 3])
def test_second_largest_exchanges_the_two_largest(length: int) -> None:
    (batch,) = make("second-largest", recurrent(f"second-largest/length_{length}"), n=100).batches
    for side, answer in ((batch.clean, batch.right), (batch.corrupt, batch.wrong)):
        rows = side[..., 0].tolist()
        assert [row.index(sorted(row)[-2]) for row in rows] == answer.flatten().tolist()
    assert torch.equal(batch.clean.sort(1).values, batch.corrupt.sort(1).values)


def words(batch: Batch) -> list[tuple[str, str]]:
    letters = recurrent("g2p/gru").card["graphemes"]
    sides = ([[letters[k] for k in row if k < 29] for row in side.tolist()] for side in (batch.clean, batch.corrupt))
    return [tuple("".join(x for x in row if len(x) == 1) for row in pair) for pair in zip(*sides, strict=True)]


def sounds(batch: Batch, field: str) -> list[str]:
    return [recurrent("g2p/gru").card["phonemes"][k] for k in getattr(batch, field).flatten().tolist()]


def test_silent_letters_change_the_vowel() -> None:
    (batch,) = make("silent-letters", recurrent("g2p/gru"), n=200).batches
    vowel = {stem: pair for pair, stems in STEMS.items() for stem in stems.split()}
    assert sum(len(stems.split()) for stems in STEMS.values()) == len(vowel), "no stem twice"
    for (a, b), right, wrong in zip(words(batch), sounds(batch, "right"), sounds(batch, "wrong"), strict=True):
        assert a[:-1] == b[:-1] and {a[-1], b[-1]} == set("es")
        assert (right, wrong) == vowel[a[:-1]][:: 1 if a[-1] == "e" else -1]


def test_silent_letters_are_said_right_by_the_network() -> None:
    task = make("silent-letters", recurrent("g2p/gru"), n=200)
    for batch in task.batches:
        said = outputs("g2p/gru", batch, batch.clean).argmax(-1)
        assert torch.equal(said, batch.right[..., 0])


def test_c_is_soft_before_e_and_i() -> None:
    (batch,) = make("c-before-e", recurrent("g2p/gru"), n=200).batches
    for (a, b), right, wrong in zip(words(batch), sounds(batch, "right"), sounds(batch, "wrong"), strict=True):
        assert a[0] == b[0] == "c" and a[2:] == b[2:] and (a[1] in "ei") != (b[1] in "ei")
        assert (right, wrong) == (("S", "K") if a[1] in "ei" else ("K", "S"))
    said = outputs("g2p/gru", batch, batch.clean).argmax(-1)
    assert torch.equal(said, batch.right[..., 0])


def test_brackets_are_closed_by_their_own_kind() -> None:
    model = recurrent("charlm/lstm")
    character = {i: c for c, i in model.card["characters"].items()}
    (batch,) = make("next-character", model, n=150).batches
    assert batch.clean.shape == (150, 40) and (batch.positions == 39).all()
    assert (batch.clean != batch.corrupt).sum(1).tolist() == [1] * 150
    for side, answer in ((batch.clean, batch.right), (batch.corrupt, batch.wrong)):
        for row, end in zip(side.tolist(), answer.flatten().tolist(), strict=True):
            text = "".join(character.get(k, "") for k in row)
            assert character[end] == {"(": ")", "[": "]"}[next(c for c in text if c in "([")]
    said = outputs("charlm/lstm", batch, batch.clean).argmax(-1)
    assert float((said == batch.right[..., 0]).double().mean()) > 0.9


def test_word_breaks_are_read_at_the_second_word() -> None:
    model = recurrent("word-breaks/thai_h27")
    character = {i: c for c, i in model.card["characters"].items()}
    for batch in make("word-break", model, n=100).batches:
        assert (batch.clean != batch.corrupt).sum(1).tolist() == [1] * len(batch)
        for row, other, at in zip(
            batch.clean.tolist(), batch.corrupt.tolist(), batch.positions[:, 0].tolist(), strict=True
        ):
            assert character[row[at - 1]] == "า" and character[other[at - 1]] == "เ"
        assert (batch.right == 0).all() and (batch.wrong == 1).all()


def test_the_pulse_shows_the_stimulus() -> None:
    (batch,) = make("stimulus-phase", recurrent("phase-memory/full_rank_n100"), n=40).batches
    assert torch.equal(batch.clean[..., 0], batch.corrupt[..., 0])
    assert torch.equal(batch.clean[..., 1:], batch.corrupt[..., 1:].flip(-1))
    pulses = batch.clean[..., 1:].sum(1)
    assert ((pulses > 0).sum(1) == 1).all()
    assert (pulses.sum(1) >= 61).all() and (pulses.sum(1) <= 89).all(), "0.125 to 0.175 s of 2 ms"
    assert batch.positions[0].tolist() == list(range(237, 300))
    assert float(batch.target.square().mean()) == pytest.approx(0.5, abs=0.02), "sines over one cycle"


def test_two_choice_pairs_exchange_the_inputs() -> None:
    (batch,) = make("two-choice", recurrent("2afc/rnn"), n=40).batches
    assert torch.equal(batch.clean, batch.corrupt.flip(-1))
    assert torch.equal(batch.clean.sum(1).argmax(-1), batch.right.flatten())
    shown = (batch.clean > 0).all(-1).sum(1)
    assert (shown >= 25).all() and (shown <= 75).all()


@pytest.mark.parametrize("task", sorted({run[0] for run in RUNS}))
@pytest.mark.parametrize(
    "other", [StubModel, lambda: zoo("modadd/two_layer"), lambda: recurrent("word-breaks/burmese_h27")]
)
def test_networks_of_another_kind_are_refused(task: str, other: type[StubModel]) -> None:
    with pytest.raises(TaskError, match="use '"):
        make(task, other())


def test_networks_of_other_sizes_are_refused() -> None:
    with pytest.raises(TaskError, match=r"reads 3 numbers .* 3 outputs.*a token id.*use 'toys/parity"):
        make("parity", recurrent("toys/flip-flop_gru_s0"))
    with pytest.raises(TaskError, match="has one output"):
        make("second-largest", recurrent("toys/integrator_gru_s0"))
    with pytest.raises(TaskError, match="lacks phase_offsets_cycles, dt_ms"):
        model = recurrent("phase-memory/full_rank_n100")
        make("stimulus-phase", type(model)("own", 3, 1000, None, {}, True, 3, 1))


@pytest.mark.parametrize(
    "task, name, options, match",
    [
        ("flip-flop", "toys/flip-flop_gru_s0", {"bit": 3}, "between 0 and 2"),
        ("flip-flop", "toys/flip-flop_gru_s0", {"length": 1}, "at least 2 steps"),
        ("parity", "toys/parity_gru_s0", {"length": 0}, "at least 2 steps"),
        ("integrator", "toys/integrator_gru_s0", {"length": 1}, "at least 2 steps"),
        ("stimulus-phase", "phase-memory/rank1_n512", {"length": 275}, "at least 276 steps"),
    ],
)
def test_options_out_of_range_are_refused(task: str, name: str, options: dict[str, int], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        make(task, recurrent(name), **options)


@pytest.mark.parametrize("name", ["word-breaks/thai_h15", "word-breaks/thai_h27"])
def test_where_a_word_begins_is_read_forward_and_where_it_ends_backward(name: str) -> None:
    model = ck.load(name)
    for read, right in (("begin", "l0."), ("end", "l0r.")):
        scores = ck.score(model, ck.task("word-break", model, n=24, read=read), "eap-ig", progress=False)
        rows = [i for i, unit in enumerate(scores.graph.sources) if unit.startswith(right)]
        others = [i for i, unit in enumerate(scores.graph.sources) if unit.startswith("l0") and i not in rows]
        assert scores.values[rows].abs().sum() > 10 * scores.values[others].abs().sum()
