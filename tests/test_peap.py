"""Positions: scores against the literal transformer, laws that tie them to scores without positions, whole circuits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.drawing import draw
from circuitkit.errors import FormatError, GraphError, MetricError, OptionError, TaskError
from circuitkit.evaluation.positions import position_metrics
from circuitkit.functional.select import prune_dangling
from circuitkit.methods.plan import Plan
from circuitkit.models.wiring import transformer_graph
from circuitkit.positions import MOST_ENTRIES, SLOTS, Layout, positional_graph
from circuitkit.tasks.spans import by_position, fitted_to, span_ids
from tests.families import build
from tests.oracles import literal_positions as literal
from tests.toys import SHAPES, random_model, random_task

few = settings(max_examples=5, deadline=None)
SCHEMA = {"a": [0, 0, 0, 0], "b": [2, 1, 2, 1], "c": [2, 2, 3, 1], "d": [5, 2, 3, 4], "length": [6, 3, 4, 6]}


def peap(model, task, **options):
    return ck.score(model, task, "peap", progress=False, **options)


def schema_task(model, **options):
    """Prompts of different lengths; spans of different lengths, some of them empty."""
    return random_task(model, lengths=torch.tensor(SCHEMA["length"]), spans=SCHEMA, **options)


def within(scores):
    """Scores of the edges within spans, [span, src, dst] of the position-free graph; and of those inside attention."""
    layout = Layout.of(scores.graph)
    values = scores.values.double()[layout.row, layout.column]
    same = torch.zeros(len(layout.spans), *layout.base.mask.shape, dtype=torch.float64)
    same[layout.same] = values[~layout.inside]
    return same, values[layout.inside], layout


def assert_close(got, want, rtol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=rtol * max(1e-3, float(want.abs().max())))


@given(shape=SHAPES)
@few
def test_every_position_scores_as_autograd_on_a_dial_at_that_position(shape):
    model = random_model(shape)
    task = random_task(model, n=2)
    got, _, layout = within(peap(model, task))
    want = sum(literal.literal_position_gradient(model, task, task.batches[0], i) for i in range(2)) / 2
    possible = torch.zeros_like(got, dtype=torch.bool)
    possible[layout.same] = True
    assert_close(got, want)
    assert torch.count_nonzero(want[~possible]) == 0, "an edge left out of the graph matters"


@given(shape=SHAPES, seed=st.integers(0, 99))
@few
def test_edges_inside_attention_score_as_one_head_patched_by_hand(shape, seed):
    model = random_model(shape)
    task = random_task(model, n=1) if not shape["causal"] else schema_task(model)
    task = task if task.spans else by_position(task)
    batch, scores = task.batches[0], peap(model, task)
    layout, values = Layout.of(scores.graph), scores.values[scores.graph.mask].double()
    inside = values[layout.inside]
    generator = torch.Generator().manual_seed(seed)
    for edge in torch.randperm(len(inside), generator=generator)[:6].tolist():
        slot, row, j, i = (int(part[edge]) for part in layout.across)
        want = 0.0
        for example, spans in enumerate(batch.spans.tolist()):
            keys, queries = ({p for p, span in enumerate(spans) if span == s} for s in (j, i))
            want += literal.literal_inside(model, task, batch, example, SLOTS[slot], row, keys, queries) / len(batch)
        assert float(inside[edge]) == pytest.approx(want, rel=1e-5, abs=1e-7)


@given(shape=SHAPES)
@few
def test_summed_over_spans_scores_are_those_without_positions(shape):
    model = random_model(shape, causal=True)
    task = schema_task(model)
    want = ck.score(model, task, "eap", progress=False).values
    for spans in ("auto", "start", "end"):
        same, _, layout = within(peap(model, task, spans=spans))
        assert layout.base.same_as(model.graph) and torch.equal(layout.base.feeds, model.graph.feeds)
        assert_close(same.sum(0), want)


def test_spans_of_length_one_are_positions_and_longer_ones_add_them_up():
    model = random_model(heads=(4, 2), position="rotary", gated=True)
    plain = random_task(model)
    ones = random_task(model, spans={f"t{i}": [i] * 4 for i in range(6)})
    by_place, alone = peap(model, plain), peap(model, ones)
    assert torch.equal(by_place.values, alone.values) and torch.equal(by_place.stderr, alone.stderr)
    starts = [0, 1, 3]
    joined = random_task(model, spans={name: [s] * 4 for name, s in zip("abc", starts, strict=True)})
    single = peap(model, plain)
    groups = [[0], [1, 2], [3, 4, 5]]
    got = within(peap(model, joined))[0]
    assert_close(got, torch.stack([within(single)[0][group].sum(0) for group in groups]))
    lengths = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert_close(within(peap(model, joined, aggregate="mean"))[0] * lengths, got)


def test_magnitudes_do_not_cancel_and_say_that_they_have_no_sign():
    model = random_model()
    task = random_task(model, n=1)
    joined = random_task(model, n=1, spans={"a": [0], "b": [2]})
    single, magnitude = within(peap(model, task))[0], peap(model, joined, aggregate="abs")
    assert not magnitude.signed and peap(model, joined).signed
    assert_close(within(magnitude)[0], torch.stack([single[:2].abs().sum(0), single[2:].abs().sum(0)]))
    assert (within(magnitude)[0] >= within(peap(model, joined))[0].abs() - 1e-6).all()


def test_prompts_of_different_lengths_score_as_each_alone():
    model = random_model(heads=(4, 2), gated=True)
    task = schema_task(model)
    alone = []
    for i, length in enumerate(SCHEMA["length"]):
        batch = task.batches[0].rows(torch.tensor([i]))
        cut = {name: getattr(batch, name)[:, :length] for name in ("clean", "corrupt", "spans")}
        one = replace(task, batches=(replace(batch, **cut),))
        assert set(batch.spans[0, length:].tolist()) <= {-1}
        # Logits exist in the spans where some example of a task is read, so the others' are no edges of this one.
        alone.append({n: float(v) for n, v in named(peap(model, one)).items()})
    for name, value in named(peap(model, task)).items():
        assert float(value) == pytest.approx(sum(one.get(name, 0.0) for one in alone) / 4, rel=1e-4, abs=1e-6)


def named(scores):
    return dict(zip(scores.graph.edge_names(), scores.values[scores.graph.mask], strict=True))


def test_an_empty_span_scores_nothing_and_a_bos_nothing_either():
    model = random_model()
    task = random_task(model, n=2, spans={"a": [1, 1], "empty": [3, 3], "b": [3, 3]})
    clean, corrupt = task.batches[0].clean.clone(), task.batches[0].corrupt.clone()
    clean[:, 0] = corrupt[:, 0] = 0
    task = replace(task, batches=(replace(task.batches[0], clean=clean, corrupt=corrupt),))
    assert task.spans == ("BOS", "a", "empty", "b")
    scores = peap(model, task)
    for name, value in named(scores).items():
        quiet = "@BOS" in name.partition("->")[0] or "@empty" in name
        assert float(value) == 0 or not quiet, name
    assert all(float(named(scores)[f"input@{span}->a0.h0<v>@{span}"]) != 0 for span in "ab")


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2", "Phi"])
def test_real_families_agree_with_scores_without_positions(family):
    model = ck.load(build(family))
    task = schema_task(model)
    scores = peap(model, task)
    want = ck.score(model, task, "eap", progress=False).values
    assert_close(within(scores)[0].sum(0), want, 1e-4)
    same = peap(model, schema_task(model, same=True))
    assert torch.count_nonzero(same.values) == 0
    whole = ck.evaluate(model, task, scores.top(scores.graph.n_edges), curve=False, progress=False)
    assert whole.faithfulness == pytest.approx(1, abs=1e-3)
    batch = task.batches[0]
    with torch.no_grad():
        corrupt = task.metric(model.logits(model.record(batch.corrupt).inputs[-1], batch.positions), batch).mean()
    assert whole.corrupt == pytest.approx(float(corrupt), abs=1e-3), "with every edge cut, the run is the corrupt one"


@given(shape=SHAPES, share=st.sampled_from([0.2, 0.5, 0.8, 0.97]), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_a_circuit_with_positions_runs_as_the_literal_one(shape, share, seed):
    model = random_model(shape, n_layers=2)  # what the first layer does wrong, the second one reads
    schema = {"a": [0, 0], "b": [2, 1], "c": [4, 1]}
    task = random_task(model, n=2, spans=schema)
    graph = positional_graph(model.graph, task.spans, {2}, causal=model.causal)
    layout = Layout.of(graph)
    keep = (torch.rand(3, *graph.mask.shape, generator=torch.Generator().manual_seed(seed)) < share) & graph.mask
    options = {"plan": Plan(progress=False), "corrupt_value": "counterfactual"}
    _, got = position_metrics(model, task, keep, layout, **options)
    view = SimpleNamespace(spans=layout.spans, names=list(graph.edge_names()))
    for values, mask in zip(got, keep, strict=True):
        kept = list(graph.edge_names(mask))
        want = [literal.literal_position_circuit(model, task, view, kept, task.batches[0], i) for i in range(2)]
        torch.testing.assert_close(values, torch.tensor(want, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("value", ["counterfactual", "mean", "zero", "position-mean"])
def test_edges_kept_in_every_span_are_the_circuit_without_positions(value):
    """With everything inside attention kept, and the same edges in all spans, positions make no difference."""
    model = random_model(heads=(4, 2), position="rotary", gated=True)
    task = schema_task(model)
    free = ck.score(model, task, "eap", progress=False).top(30)
    scores = peap(model, task)
    layout = Layout.of(scores.graph)
    chosen = torch.ones(len(layout.row), dtype=torch.bool)
    chosen[~layout.inside] = free.mask[layout.same[1], layout.same[2]]
    mask = layout.matrix(chosen.float()).bool()
    circuit = ck.Circuit(scores.graph, *mask.nonzero(as_tuple=True), torch.ones(int(mask.sum())))
    options = {"corrupt_value": value, "curve": False, "progress": False}
    with_positions, without = (ck.evaluate(model, task, c, **options) for c in (circuit, free))
    assert with_positions.circuit == pytest.approx(without.circuit, rel=1e-6)
    assert with_positions.faithfulness == pytest.approx(without.faithfulness, rel=1e-6)
    assert torch.equal(layout.collapse(mask), free.mask)


def test_the_work_can_be_cut_when_judging_too():
    model = random_model(heads=(2, 1))
    task = schema_task(model)
    graph = positional_graph(model.graph, task.spans, {3})
    keep = (torch.rand(3, *graph.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6) & graph.mask
    one, two = (
        position_metrics(model, task, keep, Layout.of(graph), plan=plan, corrupt_value="mean")
        for plan in (Plan(progress=False), Plan(batch_size=1, budget=1024, progress=False))
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    assert len(set(one[1].mean(1).tolist())) == 3


@pytest.mark.parametrize(("heads", "causal"), [((4, 2), True), ((1, 1), True), ((2, 2), False)])
def test_the_graph_obeys_the_rules_of_graphs(heads, causal):
    base = transformer_graph(3, *heads)
    graph = positional_graph(base, ["x", "y", "z"], [1], causal=causal)
    names = list(graph.edge_names())
    for src, dst in graph.mask.nonzero().tolist():
        assert graph.source_nodes[src].stage < graph.destination_nodes[dst].stage
    stages = [[node.stage for node in nodes] for nodes in (graph.source_nodes, graph.destination_nodes)]
    assert all(list(s) == sorted(s) for s in stages)
    assert torch.equal(prune_dangling(graph.mask, graph.feeds), graph.mask), "every possible edge can reach an answer"
    key = "a1.h0<k>" if heads[0] == heads[1] else "a1.kv0<k>"
    assert {f"{key}@x->a1.h0@y", f"{key}@y->a1.h0@y", "a1.h0<q>@y->a1.h0@y", "a2.h0@y->logits@y"} <= set(names)
    assert "a1.h0<q>@x->a1.h0@y" not in names
    assert (f"{key}@z->a1.h0@y" in names) == (not causal)
    assert not causal or not any("@z" in name for name in names), "behind the answer nothing counts"
    assert Layout.of(graph).base.same_as(base)
    back = ck.Graph.from_dict(graph.to_dict())
    assert back.same_as(graph) and torch.equal(back.feeds, graph.feeds)
    assert "span" not in base.to_dict()["sources"][0], "files of graphs without positions stay as they were"


@pytest.mark.parametrize("spans", [[], ["a", "a"], ["a->b"], ["a@b"], [""]])
def test_spans_that_no_edge_could_be_named_after_are_refused(spans):
    with pytest.raises(GraphError, match="span"):
        positional_graph(transformer_graph(1, 1, 1), spans, [0])


def test_too_many_spans_are_refused_before_memory_is_asked_for():
    many = [str(i) for i in range(200)]
    with pytest.raises(GraphError, match=f"{MOST_ENTRIES:,} are held; give a schema"):
        positional_graph(transformer_graph(12, 12, 12), many, [199])


def test_what_cannot_be_scored_is_refused():
    model = random_model()
    task = random_task(model)
    with pytest.raises(OptionError, match="expected one of sum, mean, abs"):
        peap(model, task, aggregate="max")
    with pytest.raises(OptionError, match="got spans = 'words'"):
        peap(model, task, spans="words")
    with pytest.raises(MetricError, match="zero by definition"):
        peap(model, task.with_metric("kl"))
    with pytest.raises(MetricError, match="no useful gradient"):
        peap(model, task.with_metric("accuracy"))
    ragged = random_task(model, lengths=torch.tensor([6, 3, 4, 6]))
    with pytest.raises(TaskError, match=r"3 to 6 tokens and no schema.*make the task with spans="):
        peap(model, ragged)
    assert Layout.of(peap(model, ragged, spans="end").graph).spans == ("-6", "-5", "-4", "-3", "-2", "-1")


def test_a_circuit_is_judged_by_its_own_spans_only():
    model = random_model()
    task = schema_task(model)
    circuit = peap(model, task).top(40)
    want = ck.evaluate(model, task, circuit, curve=False, progress=False).faithfulness
    assert fitted_to(task, ("a", "b", "c", "d")).spans == task.spans
    with pytest.raises(TaskError, match=r"spans a, b, c, d.*has no schema"):
        ck.evaluate(model, random_task(model, lengths=torch.tensor([6, 3, 4, 6])), circuit, progress=False)
    with pytest.raises(GraphError, match="not of random"):
        ck.evaluate(random_model(n_layers=1), task, circuit, progress=False)
    ends = peap(model, task, spans="end").top(40)
    assert ck.evaluate(model, task, ends, curve=False, progress=False).faithfulness is not None
    saved = ck.Circuit(circuit.graph, circuit.src, circuit.dst, circuit.score)
    assert ck.evaluate(model, task, saved, curve=False, progress=False).faithfulness == pytest.approx(want)


def test_the_induction_circuit_shows_where_a_head_looks(tmp_path):
    """A B .. A at fixed places: the copy comes from B, whose mark was put there by the head that looks one back."""
    model = ck.load("induction/trained")
    plain = ck.task("induction-letters", model, n=256)
    batch = plain.batches[0]
    asked = (batch.clean[:, :-1] == batch.clean[:, -1:]).int().argmax(1)  # where A stands first
    schema = {name: (asked + step).tolist() for name, step in (("A", 0), ("B", 1), ("after", 2))}
    schema = {"before": [0] * len(batch)} | schema | {"end": [7] * len(batch)}
    names, ids = span_ids(schema, batch.lengths, 8)
    task = replace(plain, spans=names, batches=(replace(batch, spans=ids),))
    circuit = ck.find(model, task, method="peap", edges=6, progress=False)
    edges = set(circuit.edge_names())
    assert {"input@A->a0.h0<v>@A", "a0.h0<v>@A->a0.h0@B", "a0.h0@B->a1.h0<k>@B", "a1.h0<k>@B->a1.h0@end"} <= edges
    assert circuit.result.better_than_chance and circuit.result.faithfulness > 0.8
    assert circuit.result.known == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "auroc": 1.0}, (
        "and nothing but the known circuit"
    )
    circuit.save(tmp_path / "c.json")
    back = ck.Circuit.load(tmp_path / "c.json")
    assert back.edge_names() == circuit.edge_names() and back.graph.same_as(circuit.graph)
    scores = circuit.scores
    scores.save(tmp_path / "s.safetensors")
    assert ck.Scores.load(tmp_path / "s.safetensors").graph.same_as(scores.graph)
    network = circuit.to_networkx()
    assert network.nodes["a0.h0<v>@A"]["span"] == "A" and network.has_edge("a0.h0<v>@A", "a0.h0@B")
    for suffix in ("graphml", "gexf", "dot", "cyjs"):
        assert ck.export(circuit, tmp_path / f"c.{suffix}").stat().st_size > 1000
    with pytest.raises(FormatError, match="has no positions"):
        ck.export(circuit, tmp_path / "c.eap-ig.json")


def test_a_picture_has_a_column_for_every_span():
    model = random_model()
    circuit = peap(model, schema_task(model)).top(40)
    drawing = draw(circuit)
    across = dict(drawing.spans)
    assert list(across.values()) == sorted(across.values())
    places = {span: [box.x for box in drawing.boxes if box.span == span] for span in across}
    for left, right in zip(list(across), list(across)[1:], strict=False):
        assert max(places[left]) < min(places[right]), "columns do not overlap"
    assert len({(box.x, box.y) for box in drawing.boxes}) == len(drawing.boxes)
    assert all("@" not in box.label for box in drawing.boxes)
    figure = circuit.plot()
    assert {f"<b>{span}</b>" for span in across} <= {note.text for note in figure.layout.annotations}
    page = circuit._repr_html_()
    assert "a0.h0" in page


def test_cost_is_one_product_per_block_not_one_per_position(monkeypatch):
    """The number of products does not depend on how many positions there are."""
    from circuitkit.methods import peap as module

    model, counts = random_model(), []
    for length in (4, 8):
        calls = []
        real = module.position_scores
        monkeypatch.setattr(
            module, "position_scores", lambda *a, real=real, calls=calls: (calls.append(1), real(*a))[1]
        )
        peap(model, random_task(model, length=length))
        monkeypatch.undo()
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 1 + 2 * len(model.wiring.blocks)
