"""Bad input, over everything registered: a clear error that says what to do, never a plausible number."""

import math
import typing
from dataclasses import replace

import pytest
import torch

from circuitkit.errors import CircuitKitError, MetricError, OptionError, UnsupportedModel
from circuitkit.functional.metrics import METRICS as METRIC_REGISTRY
from circuitkit.functional.metrics import Metric
from circuitkit.methods.base import METHODS, edge_methods
from circuitkit.methods.base import score as plain_score
from circuitkit.runs.options import options_of
from tests.laws.exceptions import EXCEPTIONS, OPTIONS
from tests.toys import random_model, random_task

EVERY = sorted(name for name in METHODS if "transformer" in METHODS[name].families)
LEARNED = [name for name in EVERY if {"checkpoint", "steps"} <= set(options_of(METHODS[name]))]

# Options whose values a generic test would call bad, each with the reason. All other whole numbers count something and
# start at 1, all other numbers are at least 0, and all other words are choices.
NEGATIVE_IS_MEANT = {"start": "the logit with which a mask begins: below 0 means more off than on"}
ANY_WORD_IS_MEANT = {"checkpoint": "the name of a file that need not be there yet"}
BLIND_TO_LOGITS = EXCEPTIONS["a broken metric is refused"]


def score(model, task, name, **options):
    few = {"steps": 4} if name in LEARNED else {}
    return plain_score(model, task, name, progress=False, **{**few, **OPTIONS.get(name, {}), **options})


def kinds(option):
    parts = typing.get_args(option.kind) if not isinstance(option.kind, type) else ()
    return set(parts or (option.kind,))


def bad_values():
    """Every method's every option with values that cannot be meant."""
    for name in EVERY:
        for option in options_of(METHODS[name]).values():
            of = kinds(option)
            for value in _bad(option, of):
                yield pytest.param(name, option.name, value, id=f"{name}-{option.name}={value!r}")


def _bad(option, of):
    numbers = of & {int, float}
    if not numbers and bool in of:
        return ["yes", 1]
    if not numbers:
        return [True] if option.name in ANY_WORD_IS_MEANT else ["no such choice", True]
    bad = [True, "three", math.nan] + ([] if option.name in NEGATIVE_IS_MEANT else [-1])
    return bad if float in of else [*bad, 2.5, 0]


@pytest.fixture(scope="module")
def small():
    model = random_model()
    return model, random_task(model)


@pytest.mark.parametrize(("name", "option", "value"), list(bad_values()))
def test_a_value_out_of_range_is_refused_and_the_message_says_what_it_got(small, name, option, value):
    with pytest.raises(CircuitKitError) as caught:
        score(*small, name, **{option: value})
    assert isinstance(caught.value, OptionError) or isinstance(value, str), "a word may be an unknown name"
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_an_option_that_is_not_there_is_refused_naming_those_that_are(small, name):
    with pytest.raises(OptionError, match=rf"{name} has no option 'stesp'; its options are"):
        score(*small, name, stesp=3)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("block", "says"), [(0, "block 0 makes them"), (1, "block 1 makes them")])
def test_nan_in_the_weights_of_a_layer_names_that_layer(name, block, says):
    model = random_model(n_layers=3)
    task = random_task(model)
    with torch.no_grad():
        model.module.blocks[block].attn.W_V[0, 0, 0] = torch.nan
    with pytest.raises(UnsupportedModel, match=says):
        score(model, task, name)


@pytest.mark.parametrize("name", EVERY)
def test_nan_in_the_embedding_says_so(name):
    model = random_model()
    task = random_task(model)
    with torch.no_grad():
        model.module.embed.W_E[int(task.batches[0].clean[0, 0])] = torch.nan
    with pytest.raises(UnsupportedModel, match="the embedding makes them"):
        score(model, task, name)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in BLIND_TO_LOGITS])
def test_nan_in_the_unembedding_only_says_so(name):
    model = random_model()
    task = random_task(model)
    with torch.no_grad():
        model.module.unembed.W_U[:] = torch.nan
    with pytest.raises(MetricError, match=r"check (the )?final norm and (the )?unembedding"):
        score(model, task, name)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in BLIND_TO_LOGITS])
def test_a_metric_that_is_not_finite_is_refused(small, name):
    model, task = small
    broken = replace(task, metric=Metric("broken", lambda x, b: x[:, 0, 0] * 0 / 0, ("right",)))
    with pytest.raises(MetricError, match=r"'broken' is not finite on examples \[0, 1, .*the metric's formula"):
        score(model, broken, name, **({"objective": "task"} if "objective" in options_of(METHODS[name]) else {}))


@pytest.mark.parametrize("name", edge_methods())
def test_a_metric_whose_gradient_is_not_finite_is_never_a_ranking(small, name):
    """The value is fine, its derivative is infinite: what sqrt(0) gives."""
    model, task = small
    base = METRIC_REGISTRY["logit-diff"]

    def rooted(logits, batch):
        values = base.function(logits, batch)
        return values + (values - values.detach()).square().sqrt()

    broken = replace(task, metric=Metric("rooted", rooted, base.needs))
    try:
        scores = score(model, broken, name)
    except MetricError as error:
        assert "gradient" in str(error)
    else:
        assert scores.values.isfinite().all()


@pytest.mark.parametrize("name", edge_methods())
def test_a_metric_that_is_flat_at_the_clean_run_is_refused_or_seen_past(small, name):
    """KL has no gradient at the clean run: scores of nothing but zeros would be a ranking by rounding."""
    model, task = small
    try:
        scores = score(model, task.with_metric("kl"), name)
    except MetricError as error:
        assert "gradient" in str(error) and "use" in str(error)
    else:
        assert torch.count_nonzero(scores.values) > 0


RATES = [(name, option) for name in EVERY for option in options_of(METHODS[name]) if option in ("lr", "learning_rate")]


@pytest.mark.parametrize(("name", "option"), RATES)
def test_a_mask_run_that_diverges_says_so_and_what_to_do(small, name, option):
    with pytest.raises(MetricError, match=rf"{name}.* step \d.* lower {option}"):
        score(*small, name, **{option: 1.7e308})


@pytest.mark.parametrize("name", LEARNED)
def test_an_interrupted_learned_mask_goes_on_where_it_was(small, name, tmp_path):
    model, task = small
    asked = {**OPTIONS.get(name, {}), "steps": 6, "objective": "task", "warm_start": None, "progress": False}
    calls = []

    def counted(limit):
        def values(logits, batch):
            calls.append(1)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return task.metric.function(logits, batch)

        return replace(task, metric=Metric(task.metric.name, values, task.metric.needs))

    whole = plain_score(model, counted(math.inf), name, **asked)
    per_run, file = len(calls), str(tmp_path / "mask.safetensors")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        plain_score(model, counted(per_run // 2), name, checkpoint=file, **asked)
    calls.clear()
    resumed = plain_score(model, counted(math.inf), name, checkpoint=file, **asked)
    assert 0 < len(calls) < per_run, "what was done must not be done again"
    assert torch.equal(resumed.values, whole.values)


def test_scores_that_are_no_numbers_name_the_first_edge(small, monkeypatch):
    model, task = small
    len(METHODS)
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    original = METHODS["eap"]

    def spoiled(model, task, *, plan):
        scores = original(model, task, plan=plan)
        for edge in ("m0->logits", "a0.h1->m0"):
            scores.values[model.graph.edge(edge)] = math.nan
        return scores

    spoiled.level, spoiled.families = "edge", ("transformer",)
    METHODS._entries["spoiled"] = spoiled
    with pytest.raises(MetricError, match=r"2 of \d+ scores .* first that of a0.h1->m0; "):
        plain_score(model, task, "spoiled", progress=False)


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, math.nan, "ten", 10**6])
@pytest.mark.parametrize("verb", ["top", "grow"])
def test_sizes_of_circuits_out_of_range_are_refused(small, verb, bad):
    scores = score(*small, "eap")
    with pytest.raises(OptionError, match="expected a whole number between 1 and"):
        getattr(scores, verb)(bad)


@pytest.mark.parametrize("bad", [math.nan, "high", None])
def test_thresholds_that_are_no_numbers_are_refused(small, bad):
    with pytest.raises(OptionError, match="expected a number"):
        score(*small, "eap").threshold(bad)
