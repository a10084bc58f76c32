"""Path patching against edge patching, literal runs and what its labels say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.errors import OptionError
from tests.families import build
from tests.oracles.literal import literal_circuit
from tests.toys import SHAPES, random_model, random_task


def patch(model, task, **options):
    return ck.score(model, task, "path-patching", progress=False, **options)


def literal_effect(model, task, senders, receivers):
    """M(clean) - M(with these edges corrupt), for each example."""
    keep = model.graph.mask.clone()
    for sender in senders:
        for receiver in receivers:
            keep[model.graph.sources.index(sender), model.graph.destinations.index(receiver)] = False
    keep &= model.graph.mask
    return literal_circuit(model, task, model.graph.mask) - literal_circuit(model, task, keep)


@given(shape=SHAPES, data=st.data())
@settings(max_examples=8, deadline=None)
def test_sets_of_senders_and_receivers_are_what_a_literal_run_gives(shape, data):
    model = random_model(shape)
    task = random_task(model, n=3, lengths=torch.tensor([6, 3, 5]) if model.causal else None)
    graph = model.graph
    receivers = data.draw(st.lists(st.sampled_from(graph.destinations), min_size=1, max_size=3, unique=True))
    senders = ["input", *data.draw(st.lists(st.sampled_from(graph.sources[1:]), max_size=2, unique=True))]
    got = patch(model, task, senders=", ".join(senders), receivers=",".join(receivers), batch_size=2)
    want = literal_effect(model, task, senders, receivers).double()
    assert float(got.values[0, 0]) == pytest.approx(float(want.mean()), rel=1e-5, abs=1e-7)
    assert float(got.stderr[0, 0]) == pytest.approx(float(want.std() / 3**0.5), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("corrupt_value", ["counterfactual", "mean", "zero"])
def test_one_sender_and_one_reader_are_exact_edge_patching(corrupt_value):
    model = random_model(heads=(4, 2), gated=True)
    task = random_task(model)
    exact = ck.score(model, task, "exact", corrupt_value=corrupt_value, progress=False)
    for edge in ("a0.h3->logits", "a0.h1->a1.kv0<v>", "m0->a1.h2<q>", "input->m1"):
        sender, _, receiver = edge.partition("->")
        got = patch(model, task, senders=sender, receivers=receiver, corrupt_value=corrupt_value)
        assert float(got.values[0, 0]) == pytest.approx(float(exact.values[exact.graph.edge(edge)]), rel=1e-5)
        assert float(got.stderr[0, 0]) == pytest.approx(float(exact.stderr[exact.graph.edge(edge)]), rel=1e-4)


def test_without_senders_every_writer_is_patched_in_turn():
    model = random_model(heads=(2, 2))
    task = random_task(model)
    exact = ck.score(model, task, "exact", progress=False)
    got = patch(model, task, receivers="a1.h1<k>")
    assert got.rows == ("input", "L0", "L1") and got.columns == ("H0", "H1", "MLP or input")
    column = exact.graph.destinations.index("a1.h1<k>")
    want = torch.full((3, 3), math.nan)
    for name, place in {"input": (0, 2), "a0.h0": (1, 0), "a0.h1": (1, 1), "m0": (1, 2)}.items():
        want[place] = exact.values[exact.graph.sources.index(name), column]
    torch.testing.assert_close(got.values, want, equal_nan=True, rtol=1e-5, atol=1e-7)
    assert got.plot().data[0].type == "heatmap"


def test_a_head_s_name_means_its_queries_keys_and_values():
    model = random_model(heads=(4, 2))
    task = random_task(model)
    whole = patch(model, task, receivers="a1.h3")
    parts = patch(model, task, receivers="a1.h3<q>,a1.kv1<k>,a1.kv1<v>")
    torch.testing.assert_close(whole.values, parts.values, equal_nan=True)
    shared = patch(model, task, receivers="a1.h2")
    assert not torch.allclose(whole.values.nan_to_num(), shared.values.nan_to_num())


def test_shares_are_of_the_whole_effect_of_the_corruption():
    model = random_model()
    task = random_task(model)
    got = patch(model, task, corrupt_value="zero")
    assert got.clean == pytest.approx(float(literal_circuit(model, task, model.graph.mask).mean()), rel=1e-5)
    paired = patch(model, task)
    nothing = literal_circuit(model, task, torch.zeros_like(model.graph.mask)).mean()
    assert paired.corrupt == pytest.approx(float(nothing), rel=1e-5) and got.corrupt != pytest.approx(float(nothing))
    everything = patch(model, task, senders=",".join(model.graph.sources), receivers=",".join(model.graph.destinations))
    assert float(everything.normalised[0, 0]) == pytest.approx(1.0, rel=1e-5)


def test_the_path_of_the_induction_circuit_is_walked_backwards():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=32)
    onto_logits, onto_keys = (patch(model, task, receivers=r).to_pandas() for r in ("logits", "a1.h0<k>"))
    assert onto_logits.loc["L1", "H0"] > 10 * onto_logits.abs().loc["L0", "H0"]
    assert onto_keys.loc["L0", "H0"] > 10 * abs(onto_keys.loc["input", "MLP or input"])


def test_models_of_other_families_and_without_mlps_have_their_labels():
    got = patch(ck.load(build("Gemma2")), random_task(ck.load(build("Gemma2")), n=2))
    assert got.columns == ("H0", "H1", "H2", "H3", "MLP or input") and got.values.isfinite().sum() == 11
    model = random_model(attn_only=True, n_layers=1)
    assert patch(model, random_task(model)).values.isfinite().sum() == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"receivers": "a3.h5"}, "there is no 'a3.h5'"),
        ({"receivers": "a1.h0<p>"}, "did you mean a1.h0<"),
        ({"receivers": "input"}, "got receivers = 'input'"),
        ({"receivers": ""}, "there is no ''"),
        ({"senders": "a0.h0,logits"}, "got senders = 'a0.h0,logits': there is no 'logits'"),
        ({"senders": "a1.h0", "receivers": "a0.h0"}, "no edge leads from a1.h0 into a0.h0"),
        ({"corrupt_value": "mode"}, "expected one of counterfactual"),
    ],
)
def test_names_that_are_not_there_are_refused(options, message):
    model = random_model()
    with pytest.raises(OptionError, match=message):
        patch(model, random_task(model), **options)
