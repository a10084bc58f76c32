"""Feature graphs on the command line: made, tested, kept, opened and exported."""

import json
from pathlib import Path

import pytest

from circuitkit.cli import main
from circuitkit.features.graph import FeatureGraph
from circuitkit.runs.store import GRAPH_FILES

ASKED = ["graph", "stories260k", "Lucy was a girl.", "--dictionary", "stories260k/transcoders", "--max-features", "200"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs") / "run"
    assert main([*ASKED, "--contrast", " She", " He", "--out", str(folder)]) == 0
    return folder


def report(folder):
    return json.loads((folder / "report.json").read_text())


def error_of(capsys, *words):
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_a_run_holds_the_graph_its_page_and_what_ablations_say(run):
    assert sorted(path.name for path in run.iterdir()) == sorted(GRAPH_FILES)
    graph, found = FeatureGraph.load(run / "graph.json"), report(run)
    assert found["nodes"] == len(graph) < found["nodes_before"]
    assert graph.label(len(graph) - 1) == "' She' - ' He'" and "".join(graph.texts[1:]).strip() == "Lucy was a girl."
    constrained = found["predicted_against_measured"]["edges"]["constrained"]
    assert constrained["spearman"] > 0.999 and constrained["r2"] > 0.999  # direct effects are what ablations give
    assert {"free", "frozen"} < set(found["predicted_against_measured"]["edges"])
    assert len(found["random_faithfulness"]) > 1
    assert found["verdict"].startswith(("not known", "no better than chance"))  # one prompt gives no interval
    assert found["provenance"]["dictionaries"] == ["stories260k/transcoders"]
    assert len(found["provenance"]["dictionaries_sha256"]) == 5


def test_a_run_is_opened_and_exported_like_a_circuit(run, tmp_path, capsys):
    assert main(["view", str(run), "--no-open"]) == 0
    assert Path(capsys.readouterr().out.strip()) == run / "graph.html"
    for source, name in ((run, "a.graphml"), (run / "graph.json", "b.csv"), (run, "c.html")):
        assert main(["export", str(source), str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 1000


def test_other_methods_and_untested_graphs(tmp_path, capsys):
    words = ["graph", "stories260k", "Lucy was a girl.", "--dictionary", "stories260k/transcoders"]
    for method, more in (
        ("transcoder-circuits", ["--contrast", " She", " He"]),
        ("qk-attribution", ["--layer", "4", "--head", "2"]),
    ):
        assert main([*words, "--method", method, *more, "--out", str(tmp_path / method), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["nodes"] > 0 and "faithfulness" not in said and said["provenance"]["method"] == method
    assert main([*words, "--max-features", "50", "--no-test", "--out", str(tmp_path / "untested"), "--json"]) == 0
    assert "verdict" not in json.loads(capsys.readouterr().out)


def test_a_recurrent_network_reads_ids(tmp_path, capsys):
    words = ["graph", "g2p/gru", "3 1 4", "--out", str(tmp_path / "run"), "--json"]
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out)["nodes"] > 3


def test_errors_say_what_to_do(tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert "no dictionaries" in error_of(capsys, "graph", "stories260k", "Lucy", *out)
    many = [*ASKED, "--target", " elephantine", *out]
    assert "expected one token" in error_of(capsys, *many)
    assert "use: circuitkit graph" in error_of(capsys, "find", "stories260k", "ioi", "--method", "attribution-graph")
    assert "did you mean 'attribution-graph'" in error_of(capsys, *ASKED, "--method", "attribution-graf", *out)
    both = [*ASKED[:-2], "--method", "transcoder-circuits", "--target", " She", "--target", " He", *out]
    assert "explains one" in error_of(capsys, *both)
    named = [*ASKED[:-2], "--method", "qk-attribution", "--layer", "4", "--head", "2", "--target", " She", *out]
    assert "its own options name" in error_of(capsys, *named)
    assert "no tokenizer" in error_of(capsys, "graph", "induction/trained", "abc", *out)
    assert not (tmp_path / "run").exists()


def test_dictionaries_are_listed(capsys):
    assert main(["list", "dictionaries", "--json"]) == 0
    assert "stories260k/clt" in json.loads(capsys.readouterr().out)["dictionaries"]
    assert main(["help", "attribution-graph"]) == 0
    assert "--max-features" in capsys.readouterr().out


def test_what_a_reader_did_to_the_page_survives_an_export(run, tmp_path):
    from circuitkit.exporters.graph_json import View, write_graph_json
    from circuitkit.exporters.graph_json_read import read_graph_json

    graph = FeatureGraph.load(run / "graph.json")
    latent = next(node.name for node in graph.nodes if node.kind == "latent")
    view = View(pins=(latent,), supernodes=(("my group", (latent,)),), labels={latent: "my name"})
    write_graph_json(graph, tmp_path / "saved.json", slug="saved", scan="stories260k", view=view)
    for name in ("again.json", "page.html"):
        assert main(["export", str(tmp_path / "saved.json"), str(tmp_path / name)]) == 0
    assert read_graph_json(tmp_path / "again.json").view == view
    assert "my group" in (tmp_path / "page.html").read_text() and "my name" in (tmp_path / "page.html").read_text()


def test_more_errors(run, tmp_path, capsys):
    assert "did you mean" in error_of(capsys, "help", "attribution-graf")
    assert "unknown method or task" in error_of(capsys, "help", "nope")
    words = ["graph", "stories260k", "Lucy", "--dictionary", "stories260k/transcoders", "--out", tmp_path / "x"]
    assert "needs --layer and --head" in error_of(capsys, *words, "--method", "qk-attribution")
    assert "does not exist" in error_of(capsys, "view", "nope")
    (tmp_path / "alone.json").write_bytes((run / "graph.json").read_bytes())
    assert "circuitkit export" in error_of(capsys, "view", tmp_path / "alone.json")
    assert "tested when it was made" in error_of(capsys, "eval", run)
    assert "without --dictionary" in error_of(capsys, "find", "stories260k", "gender-pronoun", "--latents", "3")


def test_targets_as_ids_where_there_is_no_tokenizer(tmp_path, capsys):
    name = "modadd/modelB_clock_standard_attention"
    words = ["graph", name, "3 5", "--dictionary", f"{name}/transcoders", "--target", "8", "--out", str(tmp_path / "r")]
    assert main([*words, "--json"]) == 0
    assert FeatureGraph.load(tmp_path / "r" / "graph.json").nodes[-1].name == "logits.8@1"
    capsys.readouterr()
    assert "token ids from 3 to 9999" in error_of(capsys, "graph", name, "3 9999", *words[3:])
