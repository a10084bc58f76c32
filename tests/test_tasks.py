"""Laws that every registered task obeys, and what each of them states."""

from __future__ import annotations

import pytest
import torch

from circuitkit.errors import OptionError, TaskError
from circuitkit.tasks.base import TASKS, Batch, Task, make
from tests.stub_models import PROGRAMS, StubModel, gpt2, recurrent, stories, zoo

CASES = {
    "gender-pronoun": [stories, gpt2],
    "induction": [StubModel, stories, gpt2],
    "induction-letters": [lambda: zoo("induction/trained")],
    "modular-addition": [lambda: zoo("modadd/two_layer")],
    "tracr": [lambda program=program: zoo(f"tracr/{program}") for program in PROGRAMS],
    "ioi": [gpt2],
    "greater-than": [gpt2],
    "subject-verb-agreement": [gpt2],
    "docstring": [gpt2],
    "flip-flop": [lambda: recurrent("toys/flip-flop_tanh_s0")],
    "parity": [lambda: recurrent("toys/parity_gru_s0")],
    "integrator": [lambda: recurrent("toys/integrator_lstm_s0")],
    "second-largest": [lambda k=k: recurrent(f"second-largest/length_{k}") for k in (2, 3)],
    "silent-letters": [lambda: recurrent("g2p/gru")],
    "c-before-e": [lambda: recurrent("g2p/gru")],
    "next-character": [lambda: recurrent("charlm/lstm")],
    "word-break": [lambda: recurrent("word-breaks/thai_h15"), lambda: recurrent("word-breaks/thai_h27")],
    "stimulus-phase": [lambda: recurrent("phase-memory/full_rank_n100")],
    "two-choice": [lambda: recurrent("2afc/rnn")],
}
EACH = [pytest.param(name, model, id=f"{name}-{i}") for name, models in CASES.items() for i, model in enumerate(models)]
OPTIONS = [
    ("induction", StubModel, {"length": 6}),
    ("induction-letters", lambda: zoo("induction/trained"), {"corrupt": "moved", "known": "mechanism"}),
    ("modular-addition", lambda: zoo("modadd/two_layer"), {"replace": "first"}),
    ("modular-addition", lambda: zoo("modadd/two_layer"), {"replace": "second", "p": 7}),
    ("tracr", lambda: zoo("tracr/reverse"), {"corrupt": "shorter"}),
    ("ioi", gpt2, {"corrupt": "names"}),
    ("ioi", gpt2, {"corrupt": "exchanged"}),
    ("subject-verb-agreement", gpt2, {"attractor": False}),
    ("docstring", gpt2, {"corrupt": "both"}),
    ("flip-flop", lambda: recurrent("toys/flip-flop_tanh_s0"), {"length": 5, "bit": 2}),
    ("parity", lambda: recurrent("toys/parity_gru_s0"), {"length": 20}),
    ("integrator", lambda: recurrent("toys/integrator_lstm_s0"), {"length": 3}),
    ("stimulus-phase", lambda: recurrent("phase-memory/full_rank_n100"), {"length": 400}),
]


def equal(a: Task, b: Task) -> bool:
    return len(a.batches) == len(b.batches) and all(same(x, y) for x, y in zip(a.batches, b.batches, strict=True))


def same(a: Batch, b: Batch) -> bool:
    values = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(x is y or (x.shape == y.shape and torch.equal(x, y)) for x, y in values)


def check(task: Task, model: StubModel, n: int) -> None:
    """Aligned pairs of ids or numbers that the model can read, answers that are right or wrong but not both."""
    assert len(task) == n
    for batch in task.batches:
        numbers = getattr(model, "numbers", None)
        assert batch.clean.shape == batch.corrupt.shape
        assert batch.clean.dtype == batch.corrupt.dtype == (torch.long if numbers is None else torch.float32)
        assert numbers is None or batch.clean.shape[2:] == (numbers,)
        assert not (batch.clean == batch.corrupt).flatten(1).all(1).any()
        assert (batch.lengths >= 1).all() and int(batch.lengths.max()) == batch.clean.shape[1] <= model.n_ctx
        assert (batch.positions >= 0).all() and (batch.positions < batch.lengths[:, None]).all()
        for ids in (batch.clean, batch.corrupt):
            assert numbers is not None or (int(ids.min()) >= 0 and int(ids.max()) < model.d_vocab)
            assert (ids[torch.arange(ids.shape[1]) >= batch.lengths[:, None]] == 0).all()
        assert batch.target is None or batch.target.isfinite().all()
        if not model.causal:
            assert (batch.lengths == batch.clean.shape[1]).all()
        for field in ("right", "wrong"):
            if field in task.metric.needs:
                assert (getattr(batch, field) >= 0).any(-1).all()
        overlap = (batch.right[..., :, None] == batch.wrong[..., None, :]) & (batch.right[..., :, None] >= 0)
        assert not overlap.any()
        pairs = torch.cat([batch.clean, batch.corrupt], 1).flatten(1)
        assert len(pairs.unique(dim=0)) == len(pairs)


def test_every_registered_task_has_a_case() -> None:
    assert set(CASES) == set(TASKS)


@pytest.mark.parametrize("name, model", EACH)
@pytest.mark.parametrize("n", [1, 7, 64])
def test_pairs_are_well_stated(name: str, model: type[StubModel], n: int) -> None:
    task = make(name, model(), n=n)
    assert task.name == name
    check(task, model(), n)


@pytest.mark.parametrize("name, model, options", OPTIONS)
def test_options_keep_the_laws(name: str, model: type[StubModel], options: dict[str, object]) -> None:
    check(make(name, model(), n=16, **options), model(), 16)


@pytest.mark.parametrize("name, model", EACH)
def test_a_seed_fixes_everything_and_nothing_global(name: str, model: type[StubModel]) -> None:
    state = torch.get_rng_state()
    first = make(name, model(), n=16, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert equal(first, make(name, model(), n=16, seed=3))
    assert not equal(first, make(name, model(), n=16, seed=4))


def words(model: StubModel, ids: torch.Tensor) -> str:
    return str(model.tokenizer.decode(ids[ids >= 0]))


def test_pronouns_follow_the_noun_in_both_directions() -> None:
    model = stories()
    (batch,) = make("gender-pronoun", model, n=20).batches
    she = 0
    for i in range(20):
        clean, corrupt = (words(model, x[i, : batch.lengths[i]]) for x in (batch.clean, batch.corrupt))
        right, wrong = words(model, batch.right[i, 0]).strip(), words(model, batch.wrong[i, 0]).strip()
        assert (right, wrong) == (("She", "He") if " girl" in clean else ("He", "She"))
        assert (" girl" in clean) != (" girl" in corrupt) and (" boy" in clean) != (" boy" in corrupt)
        assert batch.clean[i, 0] == 1 and (batch.clean[i, 1:] != 1).all(), "one <s>, at the start"
        she += right == "She"
    assert she == 10


@pytest.mark.parametrize("model", [StubModel, stories])
def test_induction_calls_for_what_followed(model: type[StubModel]) -> None:
    (batch,) = make("induction", model(), n=32, length=9).batches
    start = 0 if model().tokenizer is None else 1
    for i in range(32):
        for ids, answer in ((batch.clean, batch.right), (batch.corrupt, batch.wrong)):
            first, asked = ids[i, start : start + 9].tolist(), int(ids[i, batch.lengths[i] - 1])
            assert len(set(first)) == 9
            assert first[first.index(asked) + 1] == answer[i, 0, 0]
        if start:
            assert not set(batch.clean[i, 1 : batch.lengths[i]].tolist()) & {0, 1, 2}


def test_letters_copy_from_the_only_earlier_occurrence() -> None:
    model = zoo("induction/trained")
    for corrupt in ("broken", "moved"):
        (batch,) = make("induction-letters", model, n=64, corrupt=corrupt).batches
        for clean, other, right, wrong in zip(
            batch.clean.tolist(), batch.corrupt.tolist(), batch.right.flatten(), batch.wrong.flatten(), strict=True
        ):
            assert clean[:7].count(clean[7]) == 1 and clean[clean.index(clean[7]) + 1] == right
            assert other[7] == clean[7] and other[6] == clean[6]
            if corrupt == "broken":
                assert clean[7] not in other[:7] and wrong == clean[7]
                assert sum(a != b for a, b in zip(clean, other, strict=True)) == 1
            else:
                assert other[other.index(other[7]) + 1] == wrong


@pytest.mark.parametrize(
    "replace, changed", [("both", (True, True)), ("first", (True, False)), ("second", (False, True))]
)
def test_sums_are_modular(replace: str, changed: tuple[bool, bool]) -> None:
    (batch,) = make("modular-addition", zoo("modadd/two_layer"), n=300, replace=replace).batches
    assert torch.equal(batch.clean.sum(1) % 59, batch.right[:, 0, 0])
    assert torch.equal(batch.corrupt.sum(1) % 59, batch.wrong[:, 0, 0])
    assert tuple((batch.clean != batch.corrupt).all(0).tolist()) == changed
    assert (batch.positions == 1).all()


PROGRAM = {
    "hist": lambda x: [x.count(t) for t in x],
    "reverse": lambda x: x[::-1],
    "length": lambda x: [len(x)] * len(x),
    "sort_unique": sorted,
    "frac_prevs": lambda x: [x[: i + 1].count("x") / (i + 1) for i in range(len(x))],
    "pair_balance": lambda x: [(x[: i + 1].count("(") - x[: i + 1].count(")")) / (i + 1) for i in range(len(x))],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_compiled_programs_are_right(program: str) -> None:
    model = zoo(f"tracr/{program}")
    token = {i: t for t, i in model.card["input_tokens"].items()}
    for batch in make("tracr", model, n=64).batches:
        for i in range(len(batch)):
            tokens = [token[t] for t in batch.clean[i, 1:].tolist()]
            expected = PROGRAM[program](tokens)
            assert token[int(batch.clean[i, 0])] == "BOS"
            assert batch.positions[i].tolist() == list(range(1, len(tokens) + 1))
            if batch.target is not None:
                assert batch.target[i].flatten().tolist() == pytest.approx(expected, abs=1e-6)
            else:
                values = [model.card["output_values"][str(k)] for k in batch.right[i, :, 0].tolist()]
                assert list(map(str, values)) == list(map(str, expected))


def test_known_edges_follow_the_variables() -> None:
    known = make("tracr", zoo("tracr/frac_prevs"), n=4).known
    assert known == ("input->m0", "input->a1.h0<q>", "input->a1.h0<k>", "m0->a1.h0<v>", "a1.h0->logits")
    known = set(make("tracr", zoo("tracr/pair_balance"), n=4).known or ())
    assert {"m0->a1.h0<v>", "m0->a1.h1<v>", "a1.h0->m1", "a1.h1->m1", "m1->logits"} <= known
    assert not [edge for edge in known if edge.startswith("a0")], "the heads of layer 0 do nothing"
    assert make("induction-letters", zoo("induction/trained"), n=4).known == (
        "input->a0.h0<v>",
        "a0.h0->a1.h0<k>",
        "a1.h0->logits",
    )
    assert make("modular-addition", zoo("modadd/two_layer"), n=4).known is None


def test_ioi_names_the_one_who_does_not_give() -> None:
    model = gpt2()
    (batch,) = make("ioi", model, n=32).batches
    for i in range(32):
        clean, corrupt = (words(model, x[i, : batch.lengths[i]]) for x in (batch.clean, batch.corrupt))
        right, wrong = words(model, batch.right[i, 0]), words(model, batch.wrong[i, 0])
        assert (clean.count(right), clean.count(wrong)) == (1, 2)
        assert (corrupt.count(right), corrupt.count(wrong)) == (1, 1)


def test_greater_than_splits_the_century() -> None:
    model = gpt2()
    task = make("greater-than", model, n=32)
    assert task.metric.name == "prob-diff"
    for batch in task.batches:
        for i in range(32):
            text = words(model, batch.clean[i, : batch.lengths[i]])
            year = int(text.split(" year ")[1][2:4])
            ids = {side: getattr(batch, side)[i, 0] for side in ("right", "wrong")}
            found = {side: [int(model.tokenizer.decode([k])) for k in x[x >= 0].tolist()] for side, x in ids.items()}
            assert found == {"right": list(range(year + 1, 100)), "wrong": list(range(year + 1))}
            assert " " + text.split()[-1] + "01 to" in words(model, batch.corrupt[i, : batch.lengths[i]])


@pytest.mark.parametrize("name", ["ioi", "greater-than", "subject-verb-agreement", "docstring"])
def test_a_tokenizer_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match=r"one token|two tokens"):
        make(name, stories())
    with pytest.raises(TaskError, match="no tokenizer"):
        make(name, StubModel())


@pytest.mark.parametrize("name", ["induction-letters", "modular-addition", "tracr"])
def test_a_model_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match=r"stories260k.*use"):
        make(name, stories())


def test_too_many_pairs_or_too_little_room_is_refused() -> None:
    with pytest.raises(TaskError, match="only 3481 distinct pairs"):
        make("modular-addition", zoo("modadd/two_layer"), n=3482)
    with pytest.raises(TaskError, match="only 464 distinct pairs"):
        make("tracr", zoo("tracr/hist"), n=465)
    with pytest.raises(TaskError, match="context of 8"):
        make("induction", StubModel(n_ctx=8))
    with pytest.raises(TaskError, match="context of 64"):
        make("induction", StubModel(), length=33)


@pytest.mark.parametrize(
    "name, model, options",
    [
        ("induction", StubModel, {"length": 4}),
        ("induction-letters", lambda: zoo("induction/trained"), {"corrupt": "none"}),
        ("modular-addition", lambda: zoo("modadd/two_layer"), {"p": 60}),
        ("modular-addition", lambda: zoo("modadd/two_layer"), {"replace": "third"}),
        ("tracr", lambda: zoo("tracr/hist"), {"corrupt": "longer"}),
        ("ioi", gpt2, {"corrupt": "receiver"}),
        ("docstring", gpt2, {"corrupt": "none"}),
    ],
)
def test_an_option_out_of_range_is_refused(name: str, model: type[StubModel], options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="got"):
        make(name, model(), **options)
