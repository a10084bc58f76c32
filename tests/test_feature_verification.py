"""Whether graphs are judged rightly: true graphs pass, false ones are caught, circuits are measured literally."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuitkit.dictionaries.base import Site
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.feature_faithfulness import _points, _random_points, circuit_faithfulness
from circuitkit.evaluation.feature_graphs import running_of, total_effects_of, verify
from circuitkit.evaluation.feature_refit import refit
from circuitkit.evaluation.feature_shares import FeatureFaithfulness
from circuitkit.features.attribution import attribution_graph
from circuitkit.features.hierarchical import total_effects
from circuitkit.features.interventions import FeatureIntervention, intervene
from circuitkit.features.targets import Direction, Latent, final_targets
from circuitkit.functional.agreement import r_squared, spearman
from circuitkit.testing import tiny_model
from tests.test_attribution_graphs import SETS, at, random_coder, tokens_of, transcoders

MODEL = tiny_model(n_layers=3)
DICTIONARIES = transcoders(8, 3)
TOKENS = tokens_of(MODEL, 6)


def graph_of(dictionaries=None, model=MODEL, tokens=TOKENS, **options):
    options.setdefault("targets", [3])
    return attribution_graph(model, DICTIONARIES if dictionaries is None else dictionaries, tokens, **options)


# ---------------------------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("what", ["transcoders", "cross-layer", "everything"])
def test_a_true_graph_comes_true(what):
    model, dictionaries = tiny_model(), SETS[what](8)
    graph = graph_of(dictionaries, model, targets=[3, 5])
    found = verify(model, dictionaries, graph, n_edges=40, n_nodes=20)
    for part in (found.edges, found.random_edges):
        torch.testing.assert_close(torch.tensor(part.measured["constrained"]), torch.tensor(part.predicted))
        assert len(part) == 40 and part.spearman("constrained") > 0.999 and part.r_squared("constrained") > 1 - 1e-9
        assert part.r_squared("free") < 0.999
    assert set(found.nodes.measured) == set(found.paths.measured) == {"free", "frozen"}
    assert (
        sorted(found.edges.predicted, key=abs)
        == sorted(graph.effects[:, ~graph.kind("bias")].flatten().tolist(), key=abs)[-40:]
    )
    assert not set(found.edges.names) & set(found.random_edges.names)
    assert "largest edges (40)" in repr(found) and f"{found.edges.spearman('free'):.2f}" in repr(found)


def test_a_false_graph_does_not():
    graph = graph_of()
    shuffled = graph.effects.flatten()[
        torch.randperm(graph.effects.numel(), generator=torch.Generator().manual_seed(0))
    ]
    for effects in (2 * graph.effects, -graph.effects, shuffled.reshape(graph.effects.shape)):
        false = verify(MODEL, DICTIONARIES, replace(graph, effects=effects), n_edges=30)
        assert false.edges.r_squared("constrained") < 0.9


def always_active(layers):
    """Transcoders in which every latent stays active, so that with frozen parts the model is linear."""
    made = []
    for layer in range(layers):
        coder = random_coder(8, seed=layer)
        coder.b_enc += 50.0
        coder.W_dec *= 0.02
        made.append(at("mlp-in", layer, coder, [Site("mlp-out", layer)]))
    return made


def test_where_everything_is_linear_all_paths_come_true():
    dictionaries = always_active(3)
    graph = graph_of(dictionaries, targets=[3, 7])
    found = verify(MODEL, dictionaries, graph, n_edges=30, n_nodes=200)
    for part in (found.paths, found.nodes):
        want = torch.tensor(part.predicted)
        torch.testing.assert_close(torch.tensor(part.measured["frozen"]), want, rtol=1e-6, atol=1e-8)
        assert part.r_squared("free") < 1 - 1e-6
    assert found.edges.r_squared("frozen") < 1 - 1e-6  # direct effects are not all there is


@pytest.mark.parametrize("what", ["transcoders", "attention and transcoders"])
def test_effects_through_all_paths_are_those_of_the_sweep(what):
    model, dictionaries = tiny_model(), SETS[what](8)
    graph = graph_of(dictionaries, model)
    local = running_of(model, dictionaries, graph).local
    want = total_effects(local, [final_targets(model, local, [3])[0].reads])[0] * graph.weights[-1]
    torch.testing.assert_close(total_effects_of(graph)[0, :-1], want, rtol=1e-9, atol=1e-10)


def test_directions_and_latents_are_measured_too():
    direction = Direction(Site("resid-pre", 2), -1, torch.arange(8, dtype=torch.float64))
    latent = next(node for node in graph_of().nodes if node.kind == "latent" and node.layer == 2)
    targets = [direction, Latent(Site("mlp-in", 2), latent.position, latent.index)]
    graph = graph_of(targets=targets)
    assert verify(MODEL, DICTIONARIES, graph, targets=targets).edges.r_squared("constrained") > 1 - 1e-9
    with pytest.raises(OptionError, match="Direction"):
        verify(MODEL, DICTIONARIES, graph)
    own = graph_of(targets=targets[1:])
    assert verify(MODEL, DICTIONARIES, own).edges.r_squared("constrained") > 1 - 1e-9


def test_verification_refuses_what_is_not_its_own():
    graph = graph_of()
    with pytest.raises(OptionError, match="in the graph and"):
        verify(MODEL, transcoders(8, 3, activation="topk", k=3), graph)
    with pytest.raises(GraphError, match="m2"):
        verify(MODEL, transcoders(8, 2), graph)
    with pytest.raises(OptionError, match="n_edges"):
        verify(MODEL, DICTIONARIES, graph, n_edges=0)
    with pytest.raises(OptionError, match="hard"):
        verify(MODEL, DICTIONARIES, graph, n_edges=3).edges.spearman("hard")


# ---------------------------------------------------------------------------------------------------- faithfulness


def test_everything_is_faithful_and_nothing_is_not():
    graph = graph_of(targets=[10])
    for mode in ("free", "frozen"):
        whole = circuit_faithfulness(MODEL, DICTIONARIES, graph, mode=mode, n_random=3)
        assert math.isclose(whole.faithfulness, 1, rel_tol=1e-9)
        assert whole.random == () and whole.verdict.startswith("not known")
        none = circuit_faithfulness(MODEL, DICTIONARIES, graph.part(~graph.kind("latent", "error")), mode=mode)
        assert none.faithfulness == 0 and math.isclose(none.completeness, 1, rel_tol=1e-9)
        assert "no latents" in none.verdict


@pytest.mark.parametrize("what", ["transcoders", "everything"])
@pytest.mark.parametrize("errors", ["graph", "kept", "removed"])
def test_circuits_are_measured_as_literal_interventions(what, errors):
    model, dictionaries = tiny_model(), SETS[what](8)
    graph = graph_of(dictionaries, model)
    small = graph.prune(0.5, 0.9)
    names = {node.name for node in small.nodes}
    stems = {node.name.split("@")[0].rpartition(".f")[0] for node in graph.nodes if node.kind == "latent"}
    outside = [f"{s}.f{i}@{p}" for s in sorted(stems) for i in range(16) for p in range(6)]
    gone = [n.name for n in graph.nodes if n.kind == "error" and (errors == "removed" or n.name not in names)]
    edits = [FeatureIntervention(n, 0.0) for n in outside if n not in names]
    edits += [FeatureIntervention(n, 0.0) for n in gone if errors != "kept"]
    for mode in ("free", "frozen"):
        found = circuit_faithfulness(model, dictionaries, small, targets=[(3, 5)], mode=mode, errors=errors, n_random=2)
        logits = intervene(model, dictionaries, TOKENS, [[], edits], mode=mode).logits[:, -1]
        want = (logits[:, 3] - logits[:, 5]).tolist()
        torch.testing.assert_close([found.clean[0], found.circuit[0]], want, rtol=1e-9, atol=1e-9)
        assert abs(want[0] - want[1]) > 1e-4 and len(found.random) == 2


def test_ablated_latents_can_carry_their_mean():
    prompts = [tokens_of(MODEL, n, n) for n in (4, 7)]
    empty = graph_of().part(~graph_of().kind("latent"))
    found = circuit_faithfulness(MODEL, DICTIONARIES, empty, targets=[3], baseline=prompts, errors="kept", n_random=0)
    edits = []
    for layer in range(3):
        site = Site("mlp-in", layer)
        every = torch.cat([intervene(MODEL, DICTIONARIES, p, [[]]).latents[site][0] for p in prompts])
        edits += [FeatureIntervention(f"m{layer}.f{i}", float(value)) for i, value in enumerate(every.mean(0))]
    logits = intervene(MODEL, DICTIONARIES, TOKENS, [edits]).logits[0, -1]
    assert math.isclose(found.nothing[0], float(logits[3] - logits.mean()), rel_tol=1e-9)
    assert found.ablated == "mean"


def test_many_prompts_are_one_by_one_and_random_circuits_have_the_same_size():
    prompts = [tokens_of(MODEL, n, n) for n in (4, 6, 5)]
    graphs = [graph_of(tokens=p).prune(0.9, 0.98) for p in prompts]
    assert all(0 < int(graph.kind("latent").sum()) for graph in graphs)
    together = circuit_faithfulness(MODEL, DICTIONARIES, graphs, n_random=4)
    for i, graph in enumerate(graphs):
        alone = circuit_faithfulness(MODEL, DICTIONARIES, graph, n_random=4, budget=1)
        for name in ("clean", "nothing", "circuit", "complement", "n_latents", "n_active"):
            assert math.isclose(getattr(together, name)[i], getattr(alone, name)[0], rel_tol=1e-9)
        assert alone.n_latents[0] == int(graph.kind("latent").sum())
    assert circuit_faithfulness(MODEL, DICTIONARIES, graphs, n_random=4) == together
    assert len({values for values in together.random}) == 4 and together.faithfulness_interval is None


def test_random_circuits_are_as_many_active_latents_of_each_dictionary():
    graph = graph_of().prune(0.9)
    running = running_of(MODEL, DICTIONARIES, graph)
    own = _points(running, graph)
    for drawn in _random_points(running, own, 3, torch.Generator().manual_seed(0)):
        for site, (positions, index) in drawn.items():
            assert len({*zip(positions.tolist(), index.tolist(), strict=True)}) == len(own[site][0])
            assert bool((running.clean.latents[site][positions, index] > 0).all())


def shares(circuit, random, n=8, **options):
    values = {"clean": (1.0,) * n, "nothing": (0.0,) * n, "complement": (0.1,) * n, "n_latents": (3,) * n}
    fields = {"n_active": (9,) * n, "replacement_score": 0.8, "completeness_score": 0.9, "mode": "free"}
    more = {"errors": "kept", "ablated": "zero", "seed": 0}
    circuit = tuple(circuit + 0.01 * (i % 2) for i in range(n))
    return FeatureFaithfulness(
        **values | fields | more | {"circuit": circuit, "random": tuple((r,) * n for r in random)} | options
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (shares(0.8, (0.1, 0.2)), "better than chance"),
        (
            shares(0.8, (0.1, 0.2), n=1),
            "not known: above every random circuit, but 1 prompt gives no interval; use 8 or more",
        ),
        (shares(0.8, (0.1, 0.9)), "no better than chance: a random circuit of the same size does as well"),
        (shares(0.001, (0.0,)), "no better than chance: the circuit keeps less than 1% of the behaviour"),
        (shares(0.8, ()), "not known: there is no other circuit of this size to compare with"),
        (shares(0.8, (0.1,), nothing=(1.0,) * 8), "no better than chance: ablating all latents changes nothing"),
        (shares(0.8, (0.1,), nothing=(2.0,) * 8), "no better than chance: ablating all latents does not lower"),
        (shares(0.8, (0.1,), n_latents=(0,) * 8), "no better than chance: the circuit has no latents"),
    ],
)
def test_the_verdict_is_in_words(found, verdict):
    assert found.verdict.startswith(verdict) and verdict in repr(found)
    assert found.better_than_chance == verdict.startswith("better")


@pytest.mark.parametrize(
    "options",
    [{"mode": "constrained"}, {"errors": "some"}, {"targets": [3, 4]}, {"n_random": -1}, {"targets": [999]}],
)
def test_faithfulness_refuses_bad_options(options):
    with pytest.raises(OptionError):
        circuit_faithfulness(MODEL, DICTIONARIES, graph_of(), **options)
    with pytest.raises(OptionError, match="no graphs"):
        circuit_faithfulness(MODEL, DICTIONARIES, [])


# ----------------------------------------------------------------------------------------------------------- refit


def test_learned_gates_mend_a_circuit_that_attribution_got_wrong():
    graphs = [graph_of(tokens=tokens_of(MODEL, 5, seed), targets=[3]) for seed in range(4)]
    # Influences upside down: those of least worth come first.
    wrong = [replace(g, effects=torch.where(g.effects == 0, 0.0, 1 / g.effects).clamp(-1e3, 1e3)) for g in graphs]
    state, before = torch.get_rng_state(), [p.requires_grad for p in MODEL.module.parameters()]
    found = refit(MODEL, DICTIONARIES, wrong, 16, judge=(graphs, None), steps=60, n_random=3)
    assert len(set(found.latents)) == 16 and len(found.losses) == 60
    away = [sum((a - b) ** 2 for a, b in zip(f.circuit, f.clean, strict=True)) for f in (found.before, found.after)]
    assert away[1] < 0.5 * away[0]
    few = [refit(MODEL, DICTIONARIES, wrong, 16, steps=3, n_random=0) for _ in range(2)]
    assert few[0] == few[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in MODEL.module.parameters()] == before
    with pytest.raises(OptionError, match="size"):
        refit(MODEL, DICTIONARIES, graphs, 0)
    with pytest.raises(OptionError, match="take fewer"):
        refit(MODEL, DICTIONARIES, graphs, 48)


# ------------------------------------------------------------------------------------------------ numbers, figures


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=9), st.randoms(use_true_random=False))
def test_rank_correlation_is_pearsons_of_mean_ranks(values, random):
    other = random.sample(values, len(values))
    x, y = torch.tensor(values, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    ranks = torch.stack([(v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) - 1) / 2 for v in (x, y)]).double()
    if len(set(values)) == 1:
        assert math.isnan(spearman(x, y)) and math.isnan(r_squared(x, y))
        return
    assert math.isclose(spearman(x, y), float(torch.corrcoef(ranks)[0, 1]), abs_tol=1e-9)
    assert math.isclose(spearman(x, x**3), 1) and r_squared(x, x) == 1
    assert math.isclose(r_squared(y.mean().expand_as(y), y), 0, abs_tol=1e-9)


def test_figures_say_what_they_show():
    found = verify(MODEL, DICTIONARIES, graph_of(), n_edges=20, n_nodes=10)
    figure = found.plot()
    assert [axis.title.text for axis in figure.select_yaxes()] == [
        "target less without the source", "final target less without the source",
    ]  # fmt: skip
    assert all(axis.title.text for axis in figure.select_xaxes())
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert [len(trace.x) for trace in points] == [20, 20, 20, 10, 10]
    strip = circuit_faithfulness(MODEL, DICTIONARIES, graph_of().prune(0.5), n_random=5).plot()
    assert [len(trace.x) for trace in strip.data] == [1, 1, 5] and strip.layout.xaxis.title.text
