"""Circuits of recurrent networks as pictures, files and commands: cycles and self-loops, windows, cells and gates."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache

import networkx as nx
import pydot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import circuitkit as ck
from circuitkit.cli import main
from circuitkit.drawing import KIND_NAMES, PALETTE, draw
from circuitkit.errors import FormatError, GraphError, OptionError
from circuitkit.evaluation.positions import without_windows
from circuitkit.exporters.base import export
from circuitkit.exporters.table import table_of
from circuitkit.functional import routes, select
from circuitkit.functional.layout import in_columns
from circuitkit.graph import RECURRENT_KINDS, Graph, Node
from circuitkit.models.views import group_in, read_time, view_in, viewed_like, windows_in, with_view
from circuitkit.runs.pipeline import _example, _numbers
from circuitkit.runs.provenance import data_sha256
from circuitkit.runs.store import load_run
from circuitkit.tasks.own import from_tokens
from circuitkit.viewer.page import page_data
from tests.test_viewer import CHROMIUM, dumped
from tests.toys_graph import recurrent_graph

STEPS = 6
CELLS = {
    "tanh": lambda: nn.RNN(2, 4, batch_first=True),
    "gru": lambda: nn.GRU(2, 4, num_layers=2, batch_first=True),
    "lstm": lambda: nn.LSTM(2, 4, batch_first=True, bidirectional=True),
}
VIEWS = {
    "collapsed": {},
    "windows": {"time": [(0, 2), (2, STEPS)]},
    "expanded": {"time": "expanded", "steps": STEPS},
    "last": {"time": "expanded", "steps": STEPS, "read_at": [STEPS - 1]},
    "gate": {"group": "gate"},
    "layer": {"group": "layer"},
    "direction": {"group": "direction", "time": [(0, 3), (3, STEPS)]},
}
CASES = [(cell, view) for cell in CELLS for view in VIEWS]


class Net(nn.Module):
    """Recurrent layers and a linear read-out."""

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0])


@cache
def model(cell: str, view: str = "collapsed") -> ck.Model:
    torch.manual_seed(0)
    if view != "collapsed":
        return model(cell).viewed(**VIEWS[view])
    return ck.load(Net(CELLS[cell](), 8 if cell == "lstm" else 4).double(), name=cell)


@cache
def task(known: tuple[str, ...] | None = None) -> ck.Task:
    draw_ = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randn(5, STEPS, 2, generator=draw_, dtype=torch.float64) for _ in range(2))
    right, wrong = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    return from_tokens(clean, corrupt, right, wrong, known=known)


@cache
def circuit(cell: str, view: str = "collapsed", n: int = 40) -> ck.Circuit:
    scores = ck.score(model(cell, view), task(), "eap", progress=False)
    return replace(scores.top(min(n, scores.graph.n_edges)), meta={"model": cell, "task": "own", "method": "eap"})


@cache
def subspaces() -> ck.Circuit:
    viewed = model("lstm").viewed(subspaces={"l0.c": torch.eye(4, 2)})
    return ck.score(viewed, task(), "eap", progress=False).top(60)


# networkx and files


def test_a_plain_unit_is_one_node_with_a_self_loop():
    graph = circuit("tanh", n=48).to_networkx()
    loops = set(nx.selfloop_edges(graph))
    assert loops == {(f"l0.h{i}", f"l0.h{i}") for i in range(4)}
    assert all(graph.edges[loop]["score"] != 0 for loop in loops)
    assert {data["kind"] for _, data in graph.nodes(data=True)} == {"input", "unit", "logits"}
    assert not nx.is_directed_acyclic_graph(graph)


def test_a_gated_unit_s_loop_goes_through_its_gate():
    every = model("gru").graph
    graph = ck.Circuit.from_edges(every, list(every.edge_names())).to_networkx()
    assert graph.edges["l0.h1<z>", "l0.h1"]["kind"] == "internal" and graph.edges["l0.h1", "l0.h1<z>"]["kind"] == "edge"
    assert sum(data["kind"] == "edge" for *_, data in graph.edges(data=True)) == every.n_edges
    cells = ck.Circuit.from_edges(model("lstm").graph, list(model("lstm").graph.edge_names())).to_networkx()
    assert cells.nodes["l0.c2"]["kind"] == "cell" and cells.has_edge("l0.c2<i>", "l0.h2")


@pytest.mark.parametrize("cell, view", CASES)
def test_an_expanded_graph_has_no_cycles_and_a_collapsed_one_has(cell, view):
    graph = model(cell, view).graph
    network = ck.Circuit.from_edges(graph, list(graph.edge_names())).to_networkx()
    one_way = view in ("expanded", "last")
    assert nx.is_directed_acyclic_graph(network) == one_way
    if "@" in graph.sources[0]:
        assert all("span" in data for _, data in network.nodes(data=True))


@pytest.mark.parametrize("cell, view", [*CASES, ("lstm", "subspaces")])
def test_every_format_holds_every_edge_and_loop(tmp_path, cell, view):
    chosen = subspaces() if view == "subspaces" else circuit(cell, view)
    truth = chosen.to_networkx()
    assert len(chosen) > 0
    readers = {"graphml": nx.read_graphml, "gexf": nx.read_gexf, "cyjs": _read_cyjs}
    for suffix, read in readers.items():
        back = read(export(chosen, tmp_path / f"c.{suffix}"))
        assert set(back.nodes) == set(truth.nodes) and set(back.edges) == set(truth.edges)
        for source, target, data in truth.edges(data=True):
            assert back.edges[source, target]["score"] == data["score"]
        assert all(back.nodes[name]["kind"] == data["kind"] for name, data in truth.nodes(data=True))
    graph = pydot.graph_from_dot_file(str(export(chosen, tmp_path / "c.dot")))[0]
    assert {(e.get_source().strip('"'), e.get_destination().strip('"')) for e in graph.get_edges()} == set(truth.edges)
    with pytest.raises(FormatError, match="export to graphml or json"):
        export(chosen, tmp_path / "c.eap-ig.json")
    places = [(row["x"], row["y"]) for row in table_of(chosen).nodes]
    assert len(set(places)) == len(places)


def _read_cyjs(path):
    data = json.loads(path.read_text())
    return nx.cytoscape_graph({"directed": True, "multigraph": False, **data, "data": []})


@pytest.mark.parametrize("cell, view", [*CASES, ("lstm", "subspaces")])
def test_a_saved_circuit_comes_back_exactly(tmp_path, cell, view):
    chosen = subspaces() if view == "subspaces" else circuit(cell, view)
    chosen.save(tmp_path / "c.json")
    back = ck.Circuit.load(tmp_path / "c.json")
    assert back.graph.same_as(chosen.graph) and torch.equal(back.graph.feeds, chosen.graph.feeds)
    assert torch.equal(back.src, chosen.src) and torch.equal(back.dst, chosen.dst)
    assert torch.equal(back.score, chosen.score) and back.meta == chosen.meta
    chosen.scores.save(tmp_path / "s.safetensors")
    assert torch.equal(ck.Scores.load(tmp_path / "s.safetensors").values, chosen.scores.values)


# pictures


@pytest.mark.parametrize("cell, view", [*CASES, ("lstm", "subspaces")])
def test_a_drawing_has_every_edge_and_each_box_a_place_of_its_own(cell, view):
    chosen = subspaces() if view == "subspaces" else circuit(cell, view)
    drawing = draw(chosen)
    assert sorted(curve.name for curve in drawing.curves) == sorted(chosen.edge_names())
    assert len({(box.x, box.y) for box in drawing.boxes}) == len(drawing.boxes)
    for curve in drawing.curves:
        a, b = drawing.boxes[curve.source], drawing.boxes[curve.target]
        middle = routes.along((a.x, a.y), curve.bend, (b.x, b.y), 0.5)
        if a == b:
            assert middle[0] == a.x and middle[1] >= a.y + routes.LOOP
        elif a.line == b.line:  # arcs: rightward above the boxes, leftward below
            assert (middle[1] > a.y + 0.1) == (b.x > a.x) and abs(middle[1] - a.y) > 0.1
    loops = [(curve.source, curve.bend) for curve in drawing.curves if curve.source == curve.target]
    assert len(set(loops)) == len(loops)  # the loops of one box do not hide each other
    bottom = min(box.y for box in drawing.boxes)
    assert all((box.y == bottom) == (box.kind == "input") for box in drawing.boxes if not box.span)
    assert all(box.y == drawing.height for box in drawing.boxes if box.kind == "logits")
    assert {box.kind for box in drawing.boxes} <= set(PALETTE) & set(KIND_NAMES)


def test_every_recurrent_kind_has_a_colour_of_its_own_and_a_legend_entry():
    colours = [PALETTE[kind] for kind in (*RECURRENT_KINDS, "input", "latent")]
    assert len(set(colours)) == len(colours)
    for chosen in (subspaces(), circuit("gru", "gate"), circuit("lstm", "layer")):
        shown = {trace.name for trace in chosen.plot().data if trace.showlegend is not False}
        assert {KIND_NAMES[box.kind] for box in draw(chosen).boxes} <= shown
        assert page_data(chosen)["kinds"] == KIND_NAMES


def test_time_runs_across_and_a_unit_keeps_its_line():
    drawing = draw(circuit("gru", "expanded", n=120))
    assert [text for text, _ in drawing.spans] == [f"step {i}" for i in range(STEPS)][-len(drawing.spans) :]
    middles = [x for _, x in drawing.spans]
    assert middles == sorted(middles)
    lines: dict[str, set[float]] = {}
    for box in drawing.boxes:
        lines.setdefault(box.label, set()).add(box.y)
    assert all(len(heights) == 1 for heights in lines.values()), lines
    assert [text for text, _ in draw(circuit("gru", "windows")).spans] == ["steps 0–1", "steps 2–5"]


def test_cells_stand_below_their_units_and_both_directions_side_by_side():
    every = model("lstm").graph
    drawing = draw(ck.Circuit.from_edges(every, list(every.edge_names())))
    y = {box.name: box.y for box in drawing.boxes}
    assert y["l0.c0"] == y["l0r.c3"] < y["l0.h0"] == y["l0r.h3"] < y["logits"]
    names = [box.name for box in drawing.boxes]
    assert {(names[a], names[b]) for a, b in drawing.inner} == {
        (f"{p}.c{i}", f"{p}.h{i}") for p in ("l0", "l0r") for i in range(4)
    }


def test_stages_of_a_layer_that_read_each_other_stand_above_each_other():
    """Two directions (a, c and b, d) of two stages each: c reads a, d reads b."""
    names, stages = ("a", "c", "b", "d"), (1, 2, 3, 4)
    sources = (Node("input", "input", -1, 0), *(Node(n, "unit", 0, s) for n, s in zip(names, stages, strict=True)))
    readers = (*(Node(n, "gate", 0, s) for n, s in zip(names, stages, strict=True)), Node("logits", "logits", 1, 5))
    edges = {"input": "ab", "a": "ac", "c": "c*", "b": "bd", "d": "d*"}
    mask = torch.tensor(
        [[r.name in edges[w.name] or (r.kind == "logits" and "*" in edges[w.name]) for r in readers] for w in sources]
    )
    feeds = torch.tensor([[r.name == w.name for w in sources] for r in readers])
    graph = Graph(sources, readers, mask, feeds)
    y = {box.name: box.y for box in draw(ck.Circuit.from_edges(graph, list(graph.edge_names()))).boxes}
    assert y["input"] < y["a"] == y["b"] < y["c"] == y["d"] < y["logits"]


def test_whole_gates_have_boxes_of_their_own():
    kinds = {box.name: box.kind for box in draw(circuit("gru", "gate", n=21)).boxes}
    assert kinds["l0.h<z>"] == "gate" and kinds["l0.h"] == "unit"
    assert not any("<" in box.name for box in draw(circuit("gru")).boxes)


point = st.tuples(st.floats(-9, 9), st.floats(-9, 9))


@given(point, point, point)
@settings(deadline=None)
def test_a_curve_begins_and_ends_at_its_boxes(source, bend, target):
    for at, where in ((0.0, source), (1.0, target)):
        assert routes.along(source, bend, target, at) == pytest.approx(where, abs=1e-9)


def test_arcs_stay_clear_of_the_lines_above_and_below():
    every = recurrent_graph(14)
    drawing = draw(ck.Circuit.from_edges(every, list(every.edge_names())))
    inside = [c for c in drawing.curves if drawing.boxes[c.source].line == drawing.boxes[c.target].line]
    places = [(drawing.boxes[c.source], c.bend, drawing.boxes[c.target]) for c in inside]
    heights = [routes.along((a.x, a.y), bend, (b.x, b.y), 0.5)[1] for a, bend, b in places]
    bottom, own, top = sorted({box.y for box in drawing.boxes})
    assert len(inside) == 14 * 14 and bottom + 0.9 < min(heights) < own < max(heights) < top - 0.9


def test_copies_stand_in_the_same_order_on_one_line():
    import numpy as np

    same, column = np.array([0, 1, 0, 1, 2]), np.array([0, 0, 1, 1, 1])
    x, line = in_columns(np.array([0.0, 1.0, 3.0, 2.0, 9.0]), same * 0, column, 3, same)
    assert line.tolist() == [0] * 5 and (x[0] < x[1]) == (x[2] < x[3]) and x[3] < x[4]
    _, line = in_columns(np.arange(5.0), same * 0, column, 1, same)
    assert line[0] == line[2] != line[1] == line[3]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_page_with_loops_and_layers_opens_without_a_complaint(tmp_path):
    # Nodes of kind "layer" once took on the looks of the labels that are called layers.
    path = circuit("lstm", "layer").to_html(tmp_path / "c.html")
    assert "data-ready=" in dumped(path, tmp_path / "profile")
    assert "kind-${box.kind}" in path.read_text() and page_data(circuit("lstm", "layer"))["boxes"][2]["kind"] == "layer"


# selection


def test_a_circuit_is_found_where_a_weak_edge_is_the_only_way_in():
    graph = model("tanh").graph
    values = graph.mask.double()
    values[:2] *= 1e-3  # inputs are weaker than all recurrent edges
    values *= 1 + 1e-6 * torch.arange(values.numel()).reshape(values.shape)
    scores = ck.Scores(values, graph, "made up")
    order = select.ranked_edges(values, graph.mask, absolute=True)
    assert not select.largest_connected(order, 10, graph.mask, graph.feeds).any()
    for n in (3, 6, 10, 20):
        chosen = scores.top(n).mask
        assert 0 < int(chosen.sum()) <= n
        assert torch.equal(select.prune_dangling(chosen, graph.feeds), chosen)
    assert len(scores.top(10)) == 10 and len(scores.top(1)) == 0


@pytest.mark.parametrize("view", ["last", "windows"])
def test_random_circuits_of_windows_are_connected(view):
    graph = model("gru", view).graph
    for seed in range(5):
        drawn = select.random_connected(15, graph.mask, graph.feeds, torch.Generator().manual_seed(seed))
        assert 0 < int(drawn.sum()) <= 15 and torch.equal(select.prune_dangling(drawn, graph.feeds), drawn)


# views of models


@pytest.mark.parametrize("cell, view", CASES)
def test_a_view_is_read_off_its_graph(cell, view):
    base, viewed = model(cell), model(cell, view)
    assert viewed_like(base, viewed.graph).graph.same_as(viewed.graph)
    about = view_in(viewed.graph)
    assert (
        with_view(base, about["time"], steps=about["steps"], group=about["group"]).view.windows == viewed.view.windows
    )
    assert about["group"] == VIEWS[view].get("group", "unit") == group_in(viewed.graph)
    assert windows_in(viewed.graph) == viewed.view.windows


def test_load_takes_time_and_group():
    module = Net(CELLS["gru"](), 4)
    assert ck.load(module, time="0-2,2-6").graph.same_as(ck.load(module).viewed([(0, 2), (2, 6)]).graph)
    assert ck.load(module, time="expanded", steps=3, group="gate").graph.sources[-1] == "l1.h@2"
    with pytest.raises(GraphError, match="needs steps"):
        ck.load(module, time="expanded")
    with pytest.raises(OptionError, match="0-4,4-12"):
        ck.load(module, time="often")
    with pytest.raises(GraphError, match="'unit', 'gate'"):
        ck.load(module, group="head")
    with pytest.raises(OptionError, match="group='unit'"):
        ck.load(module, neurons=2)
    for options in ({"time": "expanded"}, {"steps": 3}, {"group": "gate"}):
        with pytest.raises(OptionError, match=f"{next(iter(options))} is for recurrent networks.*peap"):
            ck.load("induction/trained", **options)


def test_time_is_read_from_text():
    assert read_time("collapsed") == "collapsed" and read_time("0-4, 4-12") == ((0, 4), (4, 12))
    for text in ("", "4", "0-4;4-8", "-1-3", "0-4,"):
        with pytest.raises(OptionError, match="first step and last step"):
            read_time(text)


# evaluation


@pytest.mark.parametrize("cell, view", CASES)
def test_a_circuit_is_judged_in_its_own_view_and_refused_in_another(cell, view):
    chosen = circuit(cell, view, 30)
    result = ck.evaluate(model(cell, view), task(), chosen, progress=False, curve=False)
    full = ck.Circuit.from_edges(chosen.graph, list(chosen.graph.edge_names()))
    whole = ck.evaluate(model(cell, view), task(), full, progress=False, curve=False)
    assert whole.faithfulness == pytest.approx(1, abs=1e-9) and result.n_edges == len(chosen)
    if view == "collapsed":
        with pytest.raises(GraphError, match=r"give model.viewed\(\) instead"):
            ck.evaluate(model(cell, "windows"), task(), chosen, progress=False)
        return
    with pytest.raises(GraphError, match="another view") as refusal:
        ck.evaluate(model(cell), task(), chosen, progress=False)
    call = str(refusal.value).partition("give model.")[2].partition(" instead")[0]
    made = eval(f"base.{call}", {"base": model(cell)})
    again = ck.evaluate(made, task(), chosen, progress=False, curve=False)
    assert again.faithfulness == result.faithfulness


def test_circuits_of_other_models_and_of_subspaces_are_refused():
    for other in (circuit("gru"), ck.Circuit.from_edges(ck.load("induction/trained").graph, [])):
        with pytest.raises(GraphError, match="load the model it was found in"):
            ck.evaluate(model("tanh"), task(), other)
    with pytest.raises(GraphError, match="load the model it was found in"):
        ck.evaluate(ck.load("induction/trained"), task(), circuit("gru", "windows"))
    with pytest.raises(GraphError, match="same directions"):
        ck.evaluate(model("lstm"), task(), subspaces())


def test_a_known_circuit_counts_in_every_window_and_not_in_groups():
    known = tuple(circuit("gru", n=20).edge_names())
    for view in ("collapsed", "windows", "expanded", "last"):
        chosen = circuit("gru", view, 30)
        found = {name.replace("@", "\0") for name in chosen.edge_names()}
        bare = {"->".join(end.partition("\0")[0] for end in name.split("->")) for name in found}
        result = ck.evaluate(model("gru", view), task(known), chosen, progress=False, curve=False)
        assert result.known["precision"] == pytest.approx(len(bare & set(known)) / len(bare))
        assert result.known["recall"] == pytest.approx(len(bare & set(known)) / 20)
        assert 0.5 < result.known["auroc"] <= 1
        assert set(without_windows(chosen).edge_names()) == bare
    chosen = circuit("gru", "gate")
    assert ck.evaluate(model("gru", "gate"), task(known), chosen, progress=False, curve=False).known is None


# runs


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder to run commands in."""
    monkeypatch.chdir(tmp_path)


FIND = "find toys/flip-flop_tanh_s0 flip-flop --method eap --edges 50 --n 16 --no-progress --out runs/x"


@pytest.mark.parametrize("view", ["", "--time expanded", "--time 0-4,4-12", "--group gate"])
def test_find_eval_export_and_view_on_the_command_line(folder, capsys, view):
    edges = "--edges 50" if "gate" not in view else "--edges 5"
    assert main([*FIND.replace("--edges 50", edges).split(), *view.split()]) == 0
    run = load_run("runs/x")
    asked = dict(zip(("time", "group"), ("collapsed", "unit"), strict=True)) | dict([view[2:].split()] if view else [])
    assert {name: getattr(run.manifest, name) for name in asked} == asked == {k: run.circuit.meta[k] for k in asked}
    assert run.manifest.steps == (12 if "--time" in view else None) and run.manifest.method == "eap"
    assert run.circuit.meta["example"]["clean"].startswith("[") and run.circuit.meta["example"]["target"]
    capsys.readouterr()
    assert main(["eval", "runs/x/circuit.json", "--json", "--no-progress"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["note"] == "" and again["result"]["faithfulness"] == run.circuit.result.faithfulness
    for suffix in ("graphml", "gexf", "cyjs", "dot", "json"):
        assert main(["export", "runs/x", f"c.{suffix}"]) == 0
    assert main(["view", "runs/x"]) == 0
    shutil.rmtree("runs")


def test_a_circuit_of_fifty_edges_explains_most_of_the_flip_flop(folder):
    assert main(FIND.split()) == 0
    result = load_run("runs/x").circuit.result
    # No prefix of this ranking leaves 1 to 50 connected edges: the input is told once, recurrent edges work 12 times.
    assert result.n_edges == 50 and result.better_than_chance and result.faithfulness > 0.5 > result.random_interval[1]


def test_time_on_a_transformer_is_an_error_of_one_line(folder, capsys):
    command = "find induction/trained induction-letters --method eap --n 8 --no-progress"
    for options, word in (("--time expanded", "recurrent"), ("--group gate", "recurrent"), ("--time 4", "0-4,4-12")):
        assert main([*command.split(), *options.split()]) == 2
        assert word in capsys.readouterr().err


def test_the_list_of_methods_says_what_they_are_for(capsys):
    assert main(["list", "methods", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods["eap"]["families"] == ["transformer", "recurrent"] and methods["peap"]["families"] == ["transformer"]
    assert main(["list", "methods"]) == 0
    assert "transformer, recurrent" in capsys.readouterr().out


def test_numbers_count_in_the_hash_of_the_data():
    batch = task().batches[0]
    other = replace(task(), batches=(replace(batch, clean=batch.clean + 1e-9),))
    assert data_sha256(task()) == data_sha256(replace(task())) != data_sha256(other)


def test_an_example_of_numbers_is_short_text():
    assert _numbers(torch.tensor([[0.5], [-1.0]])) == "0.5 -1"
    assert _numbers(torch.tensor([[0.5, 2.0]])) == "[0.5 2]"
    assert _numbers(torch.arange(100)[:, None] / 1.0).endswith("90 95 (one in 5 of 100 steps)")
    said = _example(model("tanh"), task().batches[0])
    assert said["clean"].count("[") == STEPS and (said["right"], said["wrong"]) == ("0", "1")
