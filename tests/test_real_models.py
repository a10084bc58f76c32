"""What is known about models that others trained or compiled must come out."""

import json

import pytest
import torch

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.errors import MetricError
from circuitkit.methods.base import edge_methods
from tests.laws.exceptions import EXCEPTIONS, OPTIONS

# The only gradient these take is at the clean run, where a squared error of zero has none.
AT_CLEAN = ("eap", "local-exact", "atp-star-edges", "peap", "relp")
CAUSAL = [name for name in edge_methods() if name not in EXCEPTIONS["what has no effect scores zero"]]
TRACR = ["frac_prevs", "hist", "length", "pair_balance", "reverse", "sort_unique"]


def test_induction_edge_ranks_first_by_exact_patching():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=128)
    scores = ck.score(model, task, "exact", progress=False)
    assert scores.to_pandas().iloc[0][["source", "destination"]].tolist() == ["a0.h0", "a1.h0<k>"]
    result = ck.evaluate(model, task, scores.top(3), progress=False)
    assert set(scores.top(3).edge_names()) == set(task.known)
    assert result.better_than_chance and 0.9 < result.faithfulness < 1.1
    assert result.known == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "auroc": 1.0}


@pytest.mark.parametrize("method", edge_methods())
@pytest.mark.parametrize("seed", [0, 1])
def test_the_damaged_control_is_reported_as_no_better_than_chance(method, seed):
    model = ck.load("induction/damaged")
    task = ck.task("induction-letters", model, n=128, seed=seed)
    circuit = ck.find(model, task, method=method, edges=3, seed=seed, progress=False, **OPTIONS.get(method, {}))
    assert not circuit.result.better_than_chance
    assert "no better than chance" in circuit.result.verdict


@pytest.mark.parametrize("method", CAUSAL)
def test_uniform_attention_has_no_query_or_key_edges(method):
    model = ck.load("modadd/modelA_pizza_uniform_attention")
    task = ck.task("modular-addition", model, n=32)
    scores = ck.score(model, task, method, progress=False, **OPTIONS.get(method, {}))
    slots = [node.slot in ("q", "k") for node in scores.graph.destination_nodes]
    assert torch.count_nonzero(scores.values[:, torch.tensor(slots)]) == 0
    assert torch.count_nonzero(scores.values) > 0


@pytest.mark.parametrize("program", TRACR)
@pytest.mark.parametrize("method", CAUSAL)
def test_inactive_components_of_compiled_programs_score_exactly_zero(program, method):
    model = ck.load(f"tracr/{program}")
    task = ck.task("tracr", model, n=24)
    if method in AT_CLEAN and task.metric.name == "squared-error":
        with pytest.raises(MetricError, match="gradient of 'squared-error' is zero"):
            ck.score(model, task, method, progress=False, **OPTIONS.get(method, {}))
        return
    scores = ck.score(model, task, method, progress=False, **OPTIONS.get(method, {}))
    sources, destinations = (_bare(names) for names in (scores.graph.sources, scores.graph.destinations))
    for part in model.card["components"]:
        if part["active"]:
            continue
        layer = part["component"][1]
        name = f"m{layer}" if part["component"].endswith("MLP") else f"a{layer}.h{part['component'][-1]}"
        rows = [i for i, s in enumerate(sources) if s == name]
        columns = [i for i, d in enumerate(destinations) if d == name or d.startswith(f"{name}<")]
        assert rows and torch.count_nonzero(scores.values[rows]) == 0
        assert torch.count_nonzero(scores.values[:, columns]) == 0


def _bare(names):
    """Names without the positions that some methods tell apart."""
    return [name.partition("@")[0] for name in names]


@pytest.mark.parametrize("program", TRACR)
def test_the_active_circuit_alone_reproduces_the_program_under_zero_ablation(program):
    model = ck.load(f"tracr/{program}")
    task = ck.task("tracr", model, n=40)
    active = Circuit.from_edges(model.graph, list(task.known))
    result = ck.evaluate(model, task, active, corrupt_value="zero", progress=False)
    assert result.circuit == pytest.approx(result.clean, abs=1e-4)
    assert result.known["precision"] == result.known["recall"] == 1.0


@pytest.mark.parametrize("program", TRACR)
def test_exact_patching_puts_nothing_outside_the_compiled_circuit(program):
    model = ck.load(f"tracr/{program}")
    task = ck.task("tracr", model, n=40)
    scores = ck.score(model, task, "exact", progress=False)
    known = model.graph.edge_mask(task.known)
    assert float(scores.values[~known].abs().max()) < 1e-4
    assert float(scores.values[known].abs().max()) > 0.05


def test_the_pronoun_circuit_of_the_story_model_is_faithful_and_beats_random_ones():
    model = ck.load("stories260k")
    task = ck.task("gender-pronoun", model, n=32)
    circuit = ck.find(model, task, method="eap-ig", edges=100, progress=False)
    assert circuit.result.better_than_chance
    assert circuit.result.faithfulness > 0.6 > 0.1 > circuit.result.random_faithfulness
    assert circuit.result.clean > 3 and circuit.result.corrupt < -3
    again = ck.evaluate(model, ck.task("gender-pronoun", model, n=32, seed=9), circuit, progress=False)
    assert again.faithfulness > 0.6, "the circuit must hold on pairs that it was not found on"


def test_gradient_methods_agree_with_exact_patching_on_the_story_model():
    model = ck.load("stories260k")
    task = ck.task("gender-pronoun", model, n=6)
    mask = model.graph.mask
    exact = ck.score(model, task, "exact", progress=False).values[mask]
    for method, least in (("eap", 0.85), ("clean-corrupted", 0.85), ("eap-ig", 0.93)):
        got = ck.score(model, task, method, progress=False).values[mask]
        assert float(torch.corrcoef(torch.stack([got, exact]))[0, 1]) > least


def test_the_story_model_shows_no_induction():
    model = ck.load("stories260k")
    result = ck.find(model, ck.task("induction", model, n=48), method="eap-ig", edges=50, progress=False).result
    assert not result.better_than_chance


def test_kl_is_refused_by_eap_and_works_along_a_path_on_the_story_model():
    model = ck.load("stories260k")
    task = ck.task("gender-pronoun", model, n=8).with_metric("kl")
    with pytest.raises(MetricError, match="zero by definition"):
        ck.score(model, task, "eap", progress=False)
    assert float(ck.score(model, task, "eap-ig", progress=False).values.max()) > 0.1


def test_the_exchange_formats_hold_a_grouped_query_circuit(tmp_path):
    model = ck.load("stories260k")
    circuit = ck.find(model, ck.task("gender-pronoun", model, n=8), method="eap", edges=100, progress=False)
    for suffix in ("eap-ig.json", "graphml", "gexf", "dot", "cyjs", "json"):
        ck.export(circuit, tmp_path / f"circuit.{suffix}")
        assert (tmp_path / f"circuit.{suffix}").stat().st_size > 1000
    data = json.loads((tmp_path / "circuit.eap-ig.json").read_text())
    assert data["cfg"] == {"n_layers": 5, "n_heads": 8, "parallel_attn_mlp": False, "d_model": 64}
    assert "m2->a4.h2<v>" in data["edges"] and "m2->a4.h3<v>" in data["edges"]
