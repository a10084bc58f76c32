"""Relevance patching: literal rules, forward values untouched, plain attribution patching when all rules are off."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.errors import MetricError, OptionError
from circuitkit.models.hooks import hooked
from circuitkit.models.relevance import Rules, final_hooks, relevance_gradients, rule_hooks
from tests.families import build, every_family
from tests.oracles.relevance import literal_relevance, ruled_input_gradient
from tests.toys import SHAPES, random_model, random_task

OFF = {"norm_rule": False, "activation_rule": False, "half_rule": False}
FLAGS = st.fixed_dictionaries({name: st.booleans() for name in ("norm", "activation", "half", "pattern")})
few = settings(max_examples=12, deadline=None)


def options(norm, activation, half, pattern):
    return {"norm_rule": norm, "activation_rule": activation, "half_rule": half, "freeze_pattern": pattern}


@given(shape=SHAPES, flags=FLAGS)
@few
def test_scores_equal_a_literal_backward_pass_by_the_rules(shape, flags):
    model = random_model(shape)
    task = random_task(model, n=2)
    got = ck.score(model, task, "relp", progress=False, **options(**flags)).values.double()
    want = literal_relevance(model, task, **flags) * model.graph.mask
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * max(1e-3, float(want.abs().max())))


@pytest.mark.parametrize("rule", ["norm_rule", "activation_rule", "half_rule", "freeze_pattern"])
def test_each_rule_changes_the_scores(rule):
    model = random_model(gated=True)
    task = random_task(model)
    plain, ruled = (ck.score(model, task, "relp", progress=False, **OFF | {rule: on}).values for on in (False, True))
    assert not torch.allclose(plain, ruled, rtol=1e-3)


@given(shape=SHAPES)
@few
def test_with_all_rules_off_it_is_eap(shape):
    model = random_model(shape)
    task = random_task(model)
    assert torch.equal(
        ck.score(model, task, "relp", progress=False, **OFF).values, ck.score(model, task, "eap", progress=False).values
    )


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_change_gradients_and_no_value(family, dtype):
    model = ck.load(build(family, dtype=dtype))
    batch = random_task(model, n=2).batches[0]
    run, seen = model.record(batch.clean), []

    def keep(logits):
        seen.append(logits.detach())
        return logits.square().sum()

    gradients = []
    for on in (False, True):
        rules = Rules(norm=on, activation=on, half=on, pattern=on)
        _, groups = relevance_gradients(model, run, run.inputs[0][None], batch.positions, keep, rules=rules)
        gradients.append(next(groups)[1].clone())
    torch.testing.assert_close(*seen, rtol=0, atol=1e-6)
    assert not torch.allclose(*gradients, rtol=1e-2)


@every_family
def test_the_known_parts_of_mlps_are_those_of_the_model(family):
    """What a rule puts in place of the hidden layer has the hidden layer's value: its secant passes through it."""
    model = ck.load(build(family))
    seen = {}
    ports = [(i, p) for i, parts in enumerate(model.wiring.mlps) for p in (parts.pre, parts.gate, parts.hidden) if p]
    with hooked([(p, lambda x, key=(i, p): seen.update({key: x})) for i, p in ports]):
        model.record(torch.arange(12).reshape(2, 6))
    for i, parts in enumerate(model.wiring.mlps):
        gate = parts.pre if parts.gate is None else parts.gate
        want = parts.activation(seen[i, gate]) * (1 if parts.gate is None else seen[i, parts.pre])
        torch.testing.assert_close(seen[i, parts.hidden], want)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Gemma3"])
def test_norms_inside_blocks_follow_the_rule_too(family):
    """Against the same weights in transformers, with norms, activations and gates replaced one by one."""
    module = build(family)
    model, tokens = ck.load(copy.deepcopy(module)), torch.arange(12).reshape(2, 6)
    want = ruled_input_gradient(module, module.model.layers, tokens, lambda logits: logits[:, -1].square().sum())
    run, seen = model.record(tokens), {}
    x = run.inputs[0].clone().requires_grad_(True)
    before, watch = rule_hooks(model, Rules(norm=True, activation=True, half=True, pattern=False), seen)
    with model.quiet(), hooked(final_hooks(model, seen)):
        last = model.replay(run, 0, x, torch.arange(2), [*before, *watch])
        value = model.logits(last, torch.tensor([[5], [5]])).square().sum()
    got = torch.autograd.grad(value, x)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_it_works_on_groups_of_neurons():
    """The neurons' readers are what the activation rule starts from, so they must keep their gradient."""
    model = random_model(gated=True)
    task = random_task(model)
    whole, split = (ck.score(m, task, "relp", progress=False) for m in (model, model.split_mlps(5)))
    rows = [split.graph.sources.index(name) for name in ("input", "a0.h0")]
    columns = [i for i, name in enumerate(split.graph.destinations) if name.startswith("m1")]
    into = whole.graph.destinations.index("m1")
    torch.testing.assert_close(
        split.values[rows][:, columns].sum(1),
        whole.values[[whole.graph.sources.index(name) for name in ("input", "a0.h0")], into],
    )


@pytest.mark.parametrize("option", ["activation_rule", "half_rule"])
def test_a_model_whose_mlps_are_not_known_is_refused_naming_the_rule(option):
    model = random_model()
    task = random_task(model)
    model.wiring = replace(model.wiring, mlps=())
    with pytest.raises(OptionError, match=f"{option} cannot be applied .* set {option}=False"):
        ck.score(model, task, "relp", progress=False, **OFF | {option: True})
    assert ck.score(model, task, "relp", progress=False, **OFF | {"norm_rule": True}).values.any()


def test_patterns_and_norms_that_are_not_known_are_refused():
    model = random_model()
    task = random_task(model)
    wiring = model.wiring
    model.wiring = replace(wiring, patterns=())
    with pytest.raises(OptionError, match="set freeze_pattern=False"):
        ck.score(model, task, "relp", progress=False, freeze_pattern=True)
    model.wiring = replace(wiring, final_norm=None)
    with pytest.raises(OptionError, match="set norm_rule=False"):
        ck.score(model, task, "relp", progress=False)
    model.wiring = replace(wiring, inner_norms=((None, wiring.normed),))
    with pytest.raises(OptionError, match="set norm_rule=False"):
        ck.score(model, task, "relp", progress=False)


def test_an_attention_only_model_without_norms_needs_no_rule():
    model = random_model(attn_only=True, norm=None)
    task = random_task(model)
    ruled, plain = (ck.score(model, task, name, progress=False).values for name in ("relp", "eap"))
    torch.testing.assert_close(ruled, plain)


def test_kl_is_refused_as_by_eap():
    model = random_model()
    with pytest.raises(MetricError, match="at the clean run is zero"):
        ck.score(model, random_task(model).with_metric("kl"), "relp", progress=False)
