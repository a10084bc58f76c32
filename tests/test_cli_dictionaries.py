"""Circuits of latents on the command line: found, kept with their dictionaries, and measured again."""

import json
import shutil

import pytest
import torch

import circuitkit as ck
from circuitkit.cli import main
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.formats import load_dictionary, save_dictionary
from circuitkit.dictionaries.named import named_dictionaries
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import FormatError
from circuitkit.runs.store import load_run

FIND = "find stories260k gender-pronoun --n 8 --latents 3 --method eap --edges 60 --no-progress --dictionary"


def random_dictionary(layer, read="mlp-in"):
    coder, generator = SparseCoder(64, 16, 64, activation="topk", k=4), torch.Generator().manual_seed(layer)
    for parameter in coder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return Dictionary(coder, Site(read, layer), (Site("mlp-out", layer),), model="stories260k")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("dictionaries")
    for layer in (1, 3):
        save_dictionary(random_dictionary(layer), made / f"mlp{layer}")
    return made


@pytest.fixture(scope="module")
def run(folder):
    path = folder.parent / "run"
    assert main([*FIND.split(), str(folder), "--out", str(path)]) == 0
    return path


def error_of(capsys, words):
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_latents_of_every_dictionary_are_nodes(run):
    graph = load_run(run).circuit.graph
    latents = [node.name for node in graph.source_nodes if node.kind == "latent"]
    assert len(latents) == 6 and {name[:2] for name in latents} == {"m1", "m3"}
    assert "m1.error" in graph.sources and "m2" in graph.sources


def test_the_run_says_which_dictionaries_and_eval_takes_the_same(run, folder, capsys):
    manifest = load_run(run).manifest
    assert manifest.dictionaries == (str(folder),) and len(set(manifest.dictionaries_sha256)) == 2
    assert main(["eval", str(run), "--json", "--no-progress"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["note"] == "" and said["result"]["faithfulness"] == load_run(run).result["faithfulness"]


def test_other_weights_are_noticed(run, folder, tmp_path, capsys):
    for layer in (1, 3):
        one = load_dictionary(folder / f"mlp{layer}")
        one.coder.b_enc.data += 0.01
        save_dictionary(one, tmp_path / f"mlp{layer}")
    assert main(["eval", str(run), "--json", "--no-progress", "--dictionary", str(tmp_path)]) == 0
    assert "the dictionaries are not those" in json.loads(capsys.readouterr().out)["note"]


def test_missing_and_superfluous_dictionaries_are_named(run, folder, tmp_path, capsys):
    assert "latents of m3" in error_of(capsys, ["eval", run, "--dictionary", folder / "mlp1"])
    save_dictionary(random_dictionary(0), tmp_path / "mlp0")
    words = ["eval", run, "--dictionary", folder, "--dictionary", tmp_path / "mlp0"]
    assert "no latents of m0" in error_of(capsys, words)
    moved = shutil.copytree(run, tmp_path / "run")
    circuit = json.loads((moved / "circuit.json").read_text())
    circuit["meta"]["dictionaries"] = []
    (moved / "circuit.json").write_text(json.dumps(circuit))
    assert "name it with --dictionary" in error_of(capsys, ["eval", moved])


def test_a_dictionary_of_another_place_or_none_is_refused(folder, tmp_path, capsys):
    save_dictionary(random_dictionary(1, "resid-pre"), tmp_path / "odd")
    assert "cannot be spliced" in error_of(capsys, [*FIND.split(), tmp_path / "odd", "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no dictionaries"):
        named_dictionaries(str(tmp_path / "empty"))


def test_the_order_of_dictionaries_makes_no_difference(folder, tmp_path):
    one, other = folder / "mlp1", folder / "mlp3"
    for words, path in ((f"{one} --dictionary {other}", "a"), (f"{other} --dictionary {one}", "b")):
        assert main([*FIND.split(), *words.split(), "--out", str(tmp_path / path)]) == 0
    a, b = (load_run(tmp_path / path).circuit for path in ("a", "b"))
    assert a.graph.sources == b.graph.sources
    torch.testing.assert_close(a.scores.values, b.scores.values, rtol=1e-4, atol=1e-5)


def test_circuits_of_a_model_spliced_in_python_say_what_eval_needs(folder, tmp_path, capsys):
    model = ck.load("stories260k")
    task = ck.task("gender-pronoun", model, n=8, seed=0)
    spliced = ck.splice(model, load_dictionary(folder / "mlp3"), latents=[1, 2, 5])
    ck.find(spliced, task, method="eap", edges=40, progress=False).save(tmp_path / "c.json")
    assert "latents of m3" in error_of(capsys, ["eval", tmp_path / "c.json"])
    assert main(["eval", str(tmp_path / "c.json"), "--dictionary", str(folder / "mlp3"), "--no-progress"]) == 0
