"""The benchmark of methods where the circuit is known: what is measured, what counts as a loss, and going on."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import circuitkit as ck
from circuitkit.cli import main
from circuitkit.errors import FormatError, OptionError, UnknownName
from circuitkit.evaluation import ground_truth, losses
from circuitkit.evaluation.ground_truth import RANDOM, Cell, judge, without_positions
from circuitkit.evaluation.truths import TRUTHS
from circuitkit.methods.base import METHODS, edge_methods, method
from circuitkit.models.zoo import zoo_names
from circuitkit.runs import benchmark
from circuitkit.runs.benchmark import Benchmark, benchmark_methods
from circuitkit.runs.benchmark_table import every_cell, figure_of, markdown, overview
from circuitkit.scores import Scores

ROOT = Path(__file__).parent.parent
FEW = {"methods": ["eap", "exact"], "models": ["tracr/hist", "induction/damaged"], "n": 8, "progress": False}


@pytest.fixture(autouse=True)
def registry_as_found(monkeypatch):
    len(METHODS)
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))


def cell(name, model="tracr/hist", **fields):
    return Cell(name, model, 8, 0, **fields)


def constant_method(values):
    """A registered method that gives the same scores whatever the task."""

    @method("constant")
    def constant(model, task, *, plan, corrupt_value: str = "counterfactual"):
        return Scores(values(model, task), model.graph, "")


def test_every_truth_is_of_a_zoo_model_and_every_compiled_program_has_one():
    assert set(TRUTHS) <= set(zoo_names())
    assert {name for name in zoo_names() if name.startswith(("tracr/", "induction/"))} <= set(TRUTHS)


@pytest.mark.parametrize("name", sorted(TRUTHS))
def test_what_is_known_fits_the_graph_and_leaves_something_to_tell_apart(name):
    truth, model = TRUTHS[name], ck.load(name)
    task = ck.task(truth.task, model, n=4)
    known = truth.known(model, task)
    if known is None:
        return
    part, judged = known
    assert not (judged & ~model.graph.mask).any() and not (part & ~judged).any()
    assert part.any() and (judged & ~part).any()


@pytest.mark.parametrize("name", [name for name in TRUTHS if name.startswith("modadd/")])
def test_edges_said_to_have_no_effect_have_none(name):
    model = ck.load(name)
    task = ck.task("modular-addition", model, n=3)
    part, judged = TRUTHS[name].known(model, task)
    scores = ck.score(model, task, "exact", progress=False).values
    assert torch.count_nonzero(scores[judged & ~part]) == 0
    assert torch.count_nonzero(scores[part]) > 0.9 * part.sum()


def test_a_perfect_ranking_has_auroc_1_and_its_reverse_0():
    def perfect(model, task):
        return model.graph.edge_mask(task.known).float()

    constant_method(perfect)
    good = judge("constant", "tracr/hist", n=8)
    METHODS._entries.pop("constant")
    constant_method(lambda model, task: 1 - perfect(model, task))
    bad = replace(judge("constant", "tracr/hist", n=8), method="reversed")
    assert (good.auroc, bad.auroc) == (1.0, 0.0)
    assert good.faithfulness["known"] == pytest.approx(1.0, abs=1e-5)
    assert bad.faithfulness["known"] < good.faithfulness["known"]
    lost = losses.losses([good, bad, judge(RANDOM, "tracr/hist", n=8)])
    assert len(lost) == 1 and lost[0].what.startswith("AUROC 0.00")


def test_where_readers_cannot_be_compared_the_order_of_growth_is_judged():
    @method("constant")
    def constant(model, task, *, plan):
        """Right within every reader, with a large scale at components that the program does not use."""
        graph, known = model.graph, model.graph.edge_mask(task.known)
        idle = ~(graph.feeds & known.any(1)).any(1) & ~graph.sinks
        values = known.float() + 10 * (graph.mask & idle).float()
        return Scores(values, model.graph, "", comparable=False)

    assert judge("constant", "tracr/frac_prevs", n=8).auroc == 1.0
    METHODS._entries["constant"] = replaced(METHODS["constant"], comparable=True)
    assert judge("constant", "tracr/frac_prevs", n=8).auroc < 0.7


def replaced(function, **fields):
    def other(model, task, *, plan):
        return replace(function(model, task, plan=plan), **fields)

    other.level, other.families = "edge", ("transformer",)
    return other


def test_a_circuit_that_falls_apart_keeps_nothing_and_less_than_one_edge_is_not_measured():
    def logits_last(model, task):
        """Nothing is connected until m0->logits comes, and then far more than 5 % at once."""
        values = model.graph.mask.float()
        values[:, -1] *= 0.1
        values[model.graph.edge("m0->logits")] = 0.5
        return values

    constant_method(logits_last)
    found = judge("constant", "modadd/half_trained_1layer", n=8).faithfulness
    assert found["1"] is None and found["2"] is None
    assert found["5"] == 0.0


def test_programs_are_scored_with_zeros_and_a_method_without_the_option_is_not_asked_for_them():
    assert judge("exact", "tracr/hist", n=8).corrupt_value == "zero"
    seen = []

    @method("constant")
    def constant(model, task, *, plan):
        seen.append(task)
        return Scores(model.graph.mask.float(), model.graph, "")

    assert judge("constant", "tracr/hist", n=8).corrupt_value is None
    assert seen


def test_of_scores_with_positions_the_strongest_position_of_an_edge_counts():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=8)
    scores = ck.score(model, task, "peap", progress=False)
    flat = without_positions(scores, model.graph)
    assert flat.graph.same_as(model.graph) and not flat.signed
    row, column = model.graph.edge("a0.h0->a1.h0<k>")
    spans = [
        float(scores.values[scores.graph.edge(name)].abs())
        for name in scores.graph.edge_names()
        if name.startswith("a0.h0@") and "a1.h0<k>@" in name
    ]
    assert len(spans) == 8
    assert float(flat.values[row, column]) == max(spans) > 0
    plain = ck.score(model, task, "eap", progress=False)
    assert without_positions(plain, model.graph) is plain


def test_a_refusal_is_a_cell_with_the_reason():
    found = judge("eap", "tracr/frac_prevs", n=8)
    assert found.auroc is None and "gradient of 'squared-error' is zero" in found.refused


def test_the_negative_control_has_no_score_to_win():
    found = judge("exact", "induction/damaged", n=32)
    assert found.finds_a_circuit is False and found.auroc is None and found.faithfulness == {}
    assert judge(RANDOM, "induction/damaged", n=8).auroc is None


def test_losses_are_found_and_capped_at_1():
    chance = cell(RANDOM, auroc=0.5, faithfulness={"5": None, "10": 0.3, "known": 1.2})
    found = losses.losses(
        [
            chance,
            cell("all right", auroc=0.9, faithfulness={"5": 0.0, "10": 0.295, "known": 1.0}),
            cell("below chance", auroc=0.4, faithfulness={"10": 0.5, "known": 1.3}),
            cell("too small", auroc=0.9, faithfulness={"10": 0.1, "known": 0.9}),
            cell("refused", refused="no gradient"),
            cell(RANDOM, model="induction/damaged"),
            cell("sees ghosts", model="induction/damaged", finds_a_circuit=True),
        ]
    )
    assert {loss.method: loss.what for loss in found} == {
        "below chance": "AUROC 0.40",
        "too small": "faithfulness at 10 % 0.10, random 0.30; faithfulness at the known size 0.90, random 1.20",
        "sees ghosts": "finds a circuit where there is none",
    }


def test_a_loss_without_a_reason_is_reported_and_with_one_it_is_not(monkeypatch):
    cells = [cell(RANDOM, auroc=0.5), cell("eap", auroc=0.1)]
    found = Benchmark(tuple(cells), {"n": 8, "seed": 0})
    assert benchmark.unexplained(cells) == ["eap on tracr/hist: AUROC 0.10"]
    assert any("none given yet" in line for line in markdown(found))
    monkeypatch.setitem(losses.REASONS, "eap", {"tracr/hist": "every query is saturated there"})
    assert benchmark.unexplained(cells) == []
    assert any("| every query is saturated there |" in line for line in markdown(found))


def test_peak_memory_is_that_of_the_call():
    # In a fresh process, as `measured` asks for: this one may hold freed memory, which is used again uncounted.
    call = "measured(lambda: torch.ones(20_000_000).sum(), torch.device('cpu'))[1]"
    code = f"import torch; from circuitkit.evaluation.cost import measured; c = {call}; print(c.seconds, c.peak_bytes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    assert float(seconds) > 0
    assert peak == "None" or 70e6 < int(peak) < 200e6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, benchmark_methods(folder, **FEW)


def test_a_benchmark_writes_cells_tables_and_a_figure(run):
    folder, found = run
    assert sorted(path.name for path in folder.iterdir()) == ["cells", "methods.html", "methods.json", "methods.md"]
    assert Benchmark.load(folder / "methods.json") == found
    assert [(c.model, c.method) for c in found.cells] == [
        (m, k) for m in FEW["models"] for k in (RANDOM, "eap", "exact")
    ]
    headings, rows = overview(found)
    assert {row[0] for row in rows} == {RANDOM, "eap", "exact"} and all(len(row) == len(headings) for row in rows)
    assert all(len(row) == len(every_cell(found)[0]) for row in every_cell(found)[1])
    assert figure_of(found).data[0].x == ("tracr/hist",), "the control has no AUROC to draw"


def test_a_stopped_benchmark_goes_on_where_it_was(run, monkeypatch):
    folder, found = run
    done, code = [], benchmark._code

    def fresh(name, model, n, seed):
        done.append((name, model))
        return judge(name, model, n=n, seed=seed), True

    monkeypatch.setattr(benchmark, "_in_a_fresh_process", fresh)
    (folder / "cells" / "tracr" / "hist" / "eap.json").unlink()
    (folder / "cells" / "tracr" / "hist" / "exact.json").write_text('{"asked"')
    again = benchmark_methods(folder, **FEW)
    assert done == [("eap", "tracr/hist"), ("exact", "tracr/hist")]
    alike = [replace(c, seconds=None, peak_bytes=None) for c in again.cells]
    assert alike == [replace(c, seconds=None, peak_bytes=None) for c in found.cells]
    done.clear()
    monkeypatch.setattr(benchmark, "_code", lambda name: "edited" if name == "eap" else code(name))
    benchmark_methods(folder, **FEW)
    assert done == [("eap", "tracr/hist"), ("eap", "induction/damaged")], "its file changed, so its cells are stale"
    done.clear()
    benchmark_methods(folder, **FEW | {"seed": 1, "models": ["tracr/hist"]})
    assert len(done) == 3, "another seed is another question"


def test_a_crash_costs_one_cell_and_is_tried_again(tmp_path, monkeypatch):
    answers = iter([(cell("eap", refused="failed: RuntimeError: no"), False), (cell("eap", auroc=1.0), True)])
    monkeypatch.setattr(benchmark, "_in_a_fresh_process", lambda *_: next(answers))
    first, second = (benchmark._cell(tmp_path, "eap", "tracr/hist", 8, 0) for _ in range(2))
    assert "failed" in first.refused and second.auroc == 1.0


def test_a_process_that_dies_is_a_cell_that_says_so(monkeypatch):
    monkeypatch.setattr(benchmark, "_send", _die)
    answer, sound = benchmark._in_a_fresh_process("eap", "tracr/hist", 8, 0)
    assert not sound and "ended with code 7" in answer.refused


def _die(*_):
    import os

    os._exit(7)


def test_the_command_line(run, tmp_path, capsys):
    folder, _ = run
    command = ["benchmark", "methods", "--out", str(folder), "--n", "8", "--no-progress", "--method", "exact"]
    assert main([*command, "--model", "tracr/hist"]) == 0
    assert "exact" in capsys.readouterr().out
    assert main([*command, "--model", "tracr/hist", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][1]["auroc"] == 1.0


def test_bad_questions_are_refused_before_anything_runs(tmp_path, capsys):
    for options, error in (
        ({"methods": ["eapp"]}, UnknownName),
        ({"models": ["tracr/his"]}, UnknownName),
        ({"methods": ["activation-patching"]}, OptionError),
        ({"n": 0}, OptionError),
    ):
        with pytest.raises(error):
            benchmark_methods(tmp_path, progress=False, **options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FormatError, match="run it again"):
        Benchmark.load(tmp_path / "methods.json")


def test_the_published_table_covers_the_registry_and_every_loss_in_it_has_a_reason():
    published = Benchmark.load(ROOT / "benchmarks" / "results" / "ground_truth.json")
    assert {c.method for c in published.cells} == {RANDOM, *edge_methods()}
    assert {c.model for c in published.cells} == set(TRUTHS)
    assert benchmark.unexplained(published.cells) == []


def test_the_page_shows_the_published_table():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = re.search(r"<!-- ground-truth -->\n(.*?)\n<!-- /ground-truth -->", page, re.S)[1]
    assert shown == "\n".join(markdown(Benchmark.load(ROOT / "benchmarks" / "results" / "ground_truth.json")))


def test_reasons_name_methods_and_models_that_are_there():
    for name, reasons in losses.REASONS.items():
        assert name in edge_methods() and set(reasons) <= set(TRUTHS)
        assert all(len(reason) > 20 for reason in reasons.values())


def test_the_shares_are_those_of_the_table():
    assert ground_truth.SHARES == (1, 2, 5, 10)
