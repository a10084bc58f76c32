"""Figures say what they show, agree with their data, and stay readable from no edge to thousands."""

from __future__ import annotations

import html
from dataclasses import replace
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.circuit import Circuit
from circuitkit.drawing import PALETTE, draw, visible
from circuitkit.errors import GraphError
from circuitkit.figures.circuit import circuit_figure
from circuitkit.figures.curve import faithfulness_curve
from circuitkit.figures.heatmap import position_heatmap, score_heatmap
from circuitkit.functional.layout import crossings, layered_x, wrap_rows
from circuitkit.graph import chain_graph
from circuitkit.result import CurvePoint
from tests.toys_graph import circuit_on, recurrent_graph, result_of, scores_on, transformer_graph

GRAPHS = {
    "chain": chain_graph(4),
    "mha": transformer_graph(3, 4),
    "gqa": transformer_graph(2, 4, 2),
    "rnn": recurrent_graph(),
}


@st.composite
def layered(draw_):
    rows = np.sort(np.array(draw_(st.lists(st.integers(0, 4), min_size=2, max_size=14))))
    node = st.integers(0, len(rows) - 1)
    edges = draw_(st.lists(st.tuples(node, node).filter(lambda e: rows[e[0]] < rows[e[1]]), max_size=20))
    weight = draw_(st.lists(st.floats(0, 5), min_size=len(edges), max_size=len(edges)))
    return rows, np.array(edges, dtype=int).reshape(-1, 2), np.array(weight)


@given(layered())
def test_the_layout_never_adds_crossings_and_never_stacks_nodes(case):
    row, edges, weight = case
    x = layered_x(row, edges, weight)
    plain = layered_x(row, edges, weight, sweeps=0)
    assert crossings(x, row, edges) <= crossings(plain, row, edges)
    assert len({(a, int(b)) for a, b in zip(x, row, strict=True)}) == len(row)
    assert np.array_equal(x, layered_x(row, edges, weight))
    for level in np.unique(row):
        assert abs(x[row == level].sum()) < 1e-9


def test_a_known_tangle_is_undone():
    row = np.array([0, 0, 0, 1, 1, 1])
    edges = np.array([[0, 5], [1, 4], [2, 3]])
    assert crossings(layered_x(row, edges, np.ones(3), sweeps=0), row, edges) == 3
    assert crossings(layered_x(row, edges, np.ones(3)), row, edges) == 0


def test_wide_rows_are_broken_into_lines():
    x, line = wrap_rows(np.arange(50.0), np.zeros(50, dtype=int), 24)
    assert line.max() == 2 and len({(a, int(b)) for a, b in zip(x, line, strict=True)}) == 50


@pytest.mark.parametrize("name", GRAPHS)
def test_a_drawing_has_every_edge_and_runs_upwards(name):
    circuit = circuit_on(GRAPHS[name], 15)
    drawing = draw(circuit)
    assert sorted(curve.name for curve in drawing.curves) == sorted(circuit.edge_names())
    assert len({(box.x, box.y) for box in drawing.boxes}) == len(drawing.boxes)
    heights = [(drawing.boxes[c.source].y, drawing.boxes[c.target].y) for c in drawing.curves]
    assert all(low <= high if name == "rnn" else low < high for low, high in heights)
    assert draw(circuit) == drawing


def test_readers_are_drawn_at_their_head_and_shared_ones_apart():
    graph = transformer_graph(1, 4, 2)
    drawing = draw(
        Circuit.from_edges(graph, ["input->a0.kv1<k>", "input->a0.kv1<v>", "input->a0.h3<q>", "a0.h3->logits"])
    )
    kinds = {box.name: box.kind for box in drawing.boxes}
    assert kinds == {"input": "input", "a0.kv1": "kv", "a0.h3": "head", "logits": "logits"}
    names = [box.name for box in drawing.boxes]
    assert [(names[s], names[t]) for s, t in drawing.inner] == [("a0.kv1", "a0.h3")]
    bends = [c.bend for c in drawing.curves if names[c.target] == "a0.kv1"]
    assert len(set(bends)) == 2


def test_a_rate_stands_above_the_state_that_it_is_made_of():
    graph = ck.load("2afc/rnn").graph
    edges = ["x0->l0.h7<drive>", "x1->l0.h9<drive>", "l0.r7->l0.h9<drive>", "l0.r9->logits"]
    drawing = draw(Circuit.from_edges(graph, edges))
    names, height = [box.name for box in drawing.boxes], {box.name: box.y for box in drawing.boxes}
    assert {(names[s], names[t]) for s, t in drawing.inner} == {("l0.h7", "l0.r7"), ("l0.h9", "l0.r9")}
    assert height["l0.h7"] == height["l0.h9"] < height["l0.r7"] == height["l0.r9"]


@pytest.mark.parametrize("n", [8, 40, 300])
def test_boxes_side_by_side_do_not_touch_in_a_narrow_figure_and_labels_stay_inside(n):
    model = ck.load("toys/flip-flop_gru_s0")
    circuit = circuit_on(model.viewed("expanded", steps=12).graph, n)
    figure, drawing = circuit_figure(circuit), draw(circuit)
    boxes = [trace for trace in figure.data if trace.mode == "markers+text"]
    pixels = 560 / drawing.width if drawing.width else 560
    for row in {box.y for box in drawing.boxes}:
        x = sorted(box.x for box in drawing.boxes if box.y == row)
        for a, b in pairwise(x):
            assert (b - a) * pixels >= boxes[0].marker.size
    missing = False
    for trace in boxes:
        for text, size in zip(trace.text, trace.textfont.size, strict=True):
            missing |= not text
            assert all(0.5 * size * len(html.unescape(line)) <= trace.marker.size for line in text.split("<br>"))
        assert all(trace.hovertext)
    assert missing == ("names: point at a box" in figure.layout.title.text)
    assert figure.layout.legend.y == 0 and figure.layout.legend.yanchor == "top"


@given(st.text())
def test_visible_text_can_be_written_anywhere(text):
    shown = visible(text)
    shown.encode()
    assert visible(shown) == shown and not any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in shown)


@pytest.mark.parametrize("name", GRAPHS)
def test_circuit_figure(name):
    circuit = circuit_on(GRAPHS[name], 15)
    figure = circuit_figure(circuit)
    assert f"{len(circuit)} of {circuit.graph.n_edges} edges" in figure.layout.title.text
    assert (
        "faithfulness 0.91 [0.84, 0.97]" in figure.layout.title.text
        and "random circuits 0.07" in figure.layout.title.text
    )
    hover = [text for trace in figure.data if trace.text is not None for text in trace.text]
    assert sum("score" in text for text in hover) == len(circuit)
    drawn = {trace.line.color for trace in figure.data if trace.mode and trace.mode.startswith("lines")}
    assert {PALETTE["positive"], PALETTE["negative"]} <= drawn
    assert not any("<q>" in text for text in hover)


def test_circuit_figure_caps_edges_and_says_so():
    circuit = circuit_on(transformer_graph(12, 12), 5000)
    figure = circuit_figure(circuit)
    assert (
        "5,000 of 32,491 edges" in figure.layout.title.text and "2,000 strongest are drawn" in figure.layout.title.text
    )
    assert len(figure.data) < 40
    edges = next(trace for trace in figure.data if trace.mode == "markers")
    assert len(edges.text) == 2000


def test_circuit_figure_of_nothing_and_of_nan():
    empty = circuit_figure(Circuit.from_edges(chain_graph(1), []))
    assert any("no edges" in note.text for note in empty.layout.annotations)
    odd = Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"])
    figure = circuit_figure(replace(odd, score=torch.tensor([float("nan"), 0.0])))
    assert isinstance(figure.to_json(), str)


def test_score_heatmap_leaves_impossible_edges_blank():
    scores = scores_on(transformer_graph())
    heatmap = score_heatmap(scores).data[0]
    possible = scores.graph.mask.numpy()
    assert np.array_equal(np.isnan(heatmap.z), ~possible)
    assert np.allclose(heatmap.z[possible], scores.values.numpy()[possible])
    assert heatmap.zmid == 0 and heatmap.zmin == -heatmap.zmax
    assert heatmap.customdata[0][0] == "input → a0.h0&lt;q&gt;"


def test_position_heatmap_keeps_repeated_tokens_apart():
    values = torch.tensor([[1.0, -2.0, 0.5]])
    figure = position_heatmap(values, ["0"], ["the", "<b>", "the\x00"], "patching")
    assert figure.data[0].z.shape == (1, 3) and figure.layout.xaxis.ticktext == ("the", "&lt;b&gt;", "the␀")
    assert figure.data[0].zmax == 2 and figure.data[0].zmin == -2
    assert figure.layout.yaxis.autorange is True and "largest" not in figure.layout.title.text
    down = position_heatmap(values / 500, ["h0"], ["a", "b", "c"], "patching", upward=False, whole="1 - -1")
    assert down.layout.yaxis.autorange == "reversed"
    assert "1 is 1 - -1 · the largest effect here is 0.004" in down.layout.title.text
    with pytest.raises(GraphError, match="1 rows and 2 columns"):
        position_heatmap(values, ["0"], ["a", "b"], "")


def test_faithfulness_curve():
    result = result_of(transformer_graph())
    figure = faithfulness_curve(result)
    assert figure.layout.xaxis.type == "log"
    assert "CPR 0.810" in figure.layout.title.text and "CMD 0.120" in figure.layout.title.text
    signed, absolute, circuit, random = figure.data
    assert len(signed.x) + len(absolute.x) == sum(p.faithfulness is not None for p in result.curve_points)
    assert circuit.y == (0.91,) and circuit.error_y.array[0] == pytest.approx(0.06)
    assert random.y == (0.07,) and "random" in random.name
    assert {shape.y0 for shape in figure.layout.shapes} == {1, 0.07}


def test_faithfulness_curve_without_points():
    nothing = {
        "curve_points": (),
        "faithfulness": None,
        "random_faithfulness": None,
        "cpr": None,
        "cmd": None,
        "log_area": None,
    }
    figure = faithfulness_curve(result_of(chain_graph(1), **nothing))
    assert len(figure.data) == 0 and any("undefined" in note.text for note in figure.layout.annotations)
    only = (CurvePoint(0.0, 0, 0.0, True), CurvePoint(0.5, 3, None, True), CurvePoint(1.0, 6, 1.0, True))
    figure = faithfulness_curve(result_of(chain_graph(1), **(nothing | {"curve_points": only})))
    assert figure.data[0].x == (100.0,)


def test_methods_give_figures_and_change_no_global_template():
    before = plotly.io.templates.default
    circuit = circuit_on(transformer_graph(), 8)
    figures = [circuit.plot(), circuit.scores.heatmap(), circuit.result.curve()]
    assert all(isinstance(figure, go.Figure) for figure in figures)
    assert plotly.io.templates.default == before
