"""Sparse feature circuits: effects of nodes, edges between those that are kept, and curves of ablations."""

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.splice import splice
from circuitkit.errors import GraphError, OptionError
from circuitkit.evaluation.node_curves import node_curves
from circuitkit.methods.node_edges import node_edges
from circuitkit.methods.node_effects import moving_together, node_effects
from circuitkit.methods.sparse_feature_circuits import strongest_latents
from circuitkit.models.interventions import Intervention
from tests.families import build
from tests.test_splice import CHOSEN, dictionary, random_coder
from tests.toys import random_model, random_task


def spliced(model, dtype=torch.float64):
    for place, layer in (("transcoder", 0), ("attention SAE", 1), ("mlp SAE", 1)):
        model = splice(model, dictionary(place, layer, random_coder(model.width, seed=layer, dtype=dtype)),
                       latents=CHOSEN)  # fmt: skip
    return model


def scores(model, task, method, **options):
    return ck.score(model, task, method, progress=False, **options)


def metric_under(model, task, changes):
    batch = task.batches[0]
    logits = model.intervene(changes, batch.clean).logits
    picked = torch.stack([logits[i, batch.positions[i]] for i in range(len(batch))])
    return float(task.metric(picked.float(), batch).mean())


@pytest.mark.parametrize("family", ["native", "Llama", "Gemma2", "Phi"])
def test_with_one_step_an_effect_is_the_sum_over_readers(family):
    whole = random_model() if family == "native" else ck.load(build(family))
    model = spliced(whole, torch.float64 if family == "native" else torch.float32)
    task = random_task(model, n=3)
    edges = scores(model, task, "eap").values.sum(1)
    effects = node_effects(model, task, steps=1, progress=False)
    torch.testing.assert_close(effects.values[:, 0], edges, rtol=1e-4, atol=1e-5 * float(edges.abs().max()))
    assert effects.rows == model.graph.sources
    columns = node_effects(model, task, steps=1, per_position=True, progress=False)
    torch.testing.assert_close(columns.values.nansum(1), effects.values[:, 0], rtol=1e-3, atol=1e-4)
    # Latents and error together are what they stand for.
    before = node_effects(whole, task, steps=1, progress=False)
    of = {stem: [i for i, n in enumerate(effects.rows) if n.startswith(f"{stem}.")] for stem in ("m0", "a1", "m1")}
    for stem, rows in of.items():
        own = [i for i, n in enumerate(before.rows) if n.partition(".")[0] == stem]
        assert float(effects.values[rows].sum()) == pytest.approx(float(before.values[own].sum()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_effects_along_a_path_add_up_to_what_moving_the_whole_site_does(batch_size):
    model = spliced(random_model(scale=0.3))
    task = random_task(model, n=3)
    effects = node_effects(model, task, steps=200, progress=False, batch_size=batch_size).values[:, 0]
    clean, other = metric_under(model, task, []), model.intervene([], task.batches[0].corrupt)
    groups = [g for g in moving_together(model) if g[0][1].block >= 0]
    assert sorted(len(g) for g in groups) == [1, 2, 2, 2]  # heads of layer 0; latents and error of three places
    for group in groups:
        rows = [row for _, site in group for row in range(site.first, site.rows.stop)]
        names = [model.graph.sources[row] for row in rows]
        moved = metric_under(model, task, [Intervention(name, other.written(name)) for name in names])
        assert float(effects[rows].sum()) == pytest.approx(clean - moved, abs=2e-3)


def test_edges_are_those_of_eap_and_the_circuit_keeps_strong_nodes_only():
    model = spliced(random_model())
    task = random_task(model, n=3)
    found = scores(model, task, "sparse-feature-circuits", steps=1, node_threshold=0.1, edge_threshold=0.02)
    torch.testing.assert_close(found.values, scores(model, task, "eap").values)
    effects = node_effects(model, task, steps=1, progress=False).values[:, 0].abs()
    kept = {name for name, size in zip(model.graph.sources, effects, strict=True) if size >= 0.1} | {"input"}
    assert {n.kind for n in model.graph.source_nodes if n.name in kept} >= {"latent"} and len(kept) < len(effects)
    for edge in model.graph.edge_names(found.selected):
        source, _, reader = edge.partition("->")
        feeds = model.graph.feeds[model.graph.destinations.index(reader)]
        fed = {model.graph.sources[i] for i in feeds.nonzero().flatten().tolist()}
        assert source in kept and (fed & kept or reader == "logits")
    assert bool((found.values[found.selected].abs() >= 0.02).all()) and found.selected.any()
    everything = scores(model, task, "sparse-feature-circuits", steps=1, node_threshold=0.0, edge_threshold=0.0)
    assert torch.equal(everything.selected, model.graph.mask)
    assert ck.evaluate(model, task, everything.own(), progress=False).faithfulness == pytest.approx(1.0)
    assert len(ck.find(model, task, method="sparse-feature-circuits", steps=2, edges=9, progress=False)) <= 9


def test_curves_are_literal_ablations_and_run_from_nothing_to_the_whole():
    model = spliced(random_model())
    task = random_task(model, n=3)
    effects = node_effects(model, task, steps=2, progress=False)
    curves = node_curves(model, task, effects, sizes=[0, 3, 7, 16], corrupt_value="zero", progress=False)
    assert curves.n_nodes == len(effects.rows) - 1 == 17
    order = sorted(effects.rows[1:], key=lambda n: -abs(float(effects.values[effects.rows.index(n), 0])))
    clean, none = (metric_under(model, task, [Intervention(n, 0.0) for n in names]) for names in ((), order))
    assert (curves.clean, curves.ablated) == (pytest.approx(clean, abs=1e-5), pytest.approx(none, abs=1e-5))
    for i, n in enumerate(curves.sizes):
        for names, value in ((order[n:], curves.faithfulness[i]), (order[:n], curves.completeness[i])):
            got = metric_under(model, task, [Intervention(name, 0.0) for name in names])
            assert value == pytest.approx((got - none) / (clean - none), abs=1e-4)
    whole = node_curves(model, task, effects, progress=False)
    assert (whole.faithfulness[0], whole.completeness[0]) == (pytest.approx(0), pytest.approx(1))
    assert (whole.faithfulness[-1], whole.completeness[-1]) == (pytest.approx(1), pytest.approx(0))
    figure = whole.plot()
    assert len(figure.data) == 2 and list(figure.data[0].x) == list(whole.sizes[1:])


def test_curves_of_neurons_come_from_the_same_calls():
    model = random_model().split_mlps(group=2)
    task = random_task(model, n=3)
    curves = node_curves(model, task, node_effects(model, task, steps=2, progress=False), progress=False)
    assert curves.faithfulness[-1] == pytest.approx(1) and curves.n_nodes == len(model.graph.sources) - 1


def test_strongest_latents_are_those_of_the_largest_effects():
    model = random_model()
    task = random_task(model, n=3)
    one = dictionary("transcoder", 0, random_coder(model.width, dtype=torch.float64))
    every = splice(model, one)
    sizes = node_effects(every, task, steps=3, progress=False).values[:, 0].abs()
    latents = {n.index: float(sizes[i]) for i, n in enumerate(every.graph.source_nodes) if n.kind == "latent"}
    want = sorted(sorted(latents, key=lambda i: -latents[i])[:4])
    assert strongest_latents(model, task, one, 4, steps=3, progress=False) == want
    assert len(strongest_latents(model, task, one, 99, steps=1, progress=False)) <= 12


def test_bad_input_is_refused():
    model = random_model()
    task = random_task(model, n=2)
    effects = node_effects(model, task, steps=1, progress=False)
    with pytest.raises(OptionError, match="steps"):
        node_effects(model, task, steps=0, progress=False)
    with pytest.raises(OptionError, match="thresholds"):
        scores(model, task, "sparse-feature-circuits", node_threshold=-1.0)
    with pytest.raises(OptionError, match="sizes"):
        node_curves(model, task, effects, sizes=[99], progress=False)
    with pytest.raises(GraphError, match="not the writers"):
        node_curves(spliced(model), task, effects, progress=False)
    with pytest.raises(OptionError, match="n = 0"):
        strongest_latents(model, task, dictionary("transcoder", 0, random_coder(model.width)), 0)


@pytest.mark.parametrize("family", ["native", "Llama", "Gemma2", "Phi"])
def test_edges_between_nodes_add_up_to_those_of_eap_into_their_layer(family):
    whole = random_model() if family == "native" else ck.load(build(family))
    model = spliced(whole, torch.float64 if family == "native" else torch.float32)
    task = random_task(model, n=3)
    edges, found = scores(model, task, "eap").values, node_edges(model, task, steps=1, progress=False)
    graph, size = model.graph, float(edges.abs().max())
    torch.testing.assert_close(found.values[:, -1], edges[:, -1], rtol=1e-4, atol=1e-6 * size)
    for group in moving_together(model)[1:]:
        rows = [row for _, site in group for row in range(site.first, site.rows.stop)]
        columns = [found.graph.destinations.index(graph.sources[row]) for row in rows]
        readers = graph.feeds[:, rows].any(1)
        torch.testing.assert_close(
            found.values[:, columns].sum(1), edges[:, readers].sum(1), rtol=1e-3, atol=2e-5 * size
        )
    for name in ("m0.f3", "m0.error"):  # of a transcoder: each has a reader of its own
        own = found.values[:, found.graph.destinations.index(name)]
        torch.testing.assert_close(own, edges[:, graph.destinations.index(name)], rtol=1e-3, atol=2e-5 * size)
    again = node_edges(model, task, steps=1, progress=False, batch_size=1)
    torch.testing.assert_close(again.values, found.values, rtol=1e-4, atol=1e-5 * size)
    assert len(found.top(5)) <= 5


def test_an_edge_into_one_saes_latent_is_its_literal_derivative():
    model = spliced(random_model())
    task = random_task(model, n=3)
    batch, block = task.batches[0], model.module.blocks[1]
    found = node_edges(model, task, steps=1, progress=False)
    # Literal: the gradient at the stream behind the MLP, then through one latent of its SAE and the MLP to the stream.
    run, other = model.record(batch.clean), model.record(batch.corrupt)
    last = run.inputs[-1].clone().requires_grad_()
    behind = torch.autograd.grad(task.metric(model.logits(last, batch.positions), batch).sum(), last)[0]
    streams = []
    hook = block.hook_resid_mid.register_forward_hook(lambda _m, _a, y: streams.append(y.detach()))
    model.module(batch.clean)
    hook.remove()
    coder = model.splices[-1].coder
    x = streams[0].requires_grad_()
    latent = coder.encode(block.mlp(block.ln2(x)))[..., 4]
    back = torch.autograd.grad((latent * (behind @ coder.W_dec[0, 4])).sum(), x)[0]
    want = ((run.inputs[0] - other.inputs[0]) * back).sum() / len(batch)
    got = found.values[0, found.graph.destinations.index("m1.f4")]
    assert float(got) == pytest.approx(float(want), rel=1e-4) and abs(float(want)) > 1e-4
