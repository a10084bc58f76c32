"""Files come back equal bit for bit, are never half written, and say what is wrong when they are not ours."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from circuitkit.atomic import write_atomic
from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError
from circuitkit.graph import chain_graph
from circuitkit.runs.files import (
    load_circuit,
    load_result,
    load_scores,
    save_circuit,
    save_result,
    save_scores,
)
from circuitkit.schema import circuit_from_json, circuit_to_json, jsonable, result_from_dict, result_to_dict
from circuitkit.scores import Scores
from tests.toys_graph import circuit_on, recurrent_graph, result_of, scores_on, transformer_graph

GRAPHS = {
    "chain": chain_graph(3),
    "mha": transformer_graph(),
    "gqa": transformer_graph(2, 4, 2),
    "rnn": recurrent_graph(),
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "toy.circuit.json"
    save_circuit(circuit_on(transformer_graph(), 12), path)
    return path


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", GRAPHS)
def test_circuit_round_trip(tmp_path, name):
    circuit = circuit_on(GRAPHS[name], 10)
    circuit.save(tmp_path / "c.json")
    back = Circuit.load(tmp_path / "c.json")
    assert back.graph.same_as(circuit.graph) and torch.equal(back.graph.feeds, circuit.graph.feeds)
    assert back.edge_names() == circuit.edge_names()
    assert torch.equal(back.score, circuit.score) and torch.equal(back.stderr, circuit.stderr)
    assert back.score.dtype == circuit.score.dtype
    assert back.result == circuit.result and back.meta == circuit.meta
    assert circuit_to_json(back) == (tmp_path / "c.json").read_text()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
def test_float32_scores_are_bit_equal(values):
    full = Circuit.from_edges(chain_graph(2), list(chain_graph(2).edge_names()))
    score = torch.zeros(6)
    score[: len(values)] = torch.tensor(values, dtype=torch.float32)
    back = circuit_from_json(circuit_to_json(replace(full, score=score)))
    assert torch.equal(back.score.view(torch.int32), score.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype):
    circuit = circuit_on(chain_graph(2), 3)
    circuit = replace(circuit, score=circuit.score.to(dtype), stderr=None)
    back = circuit_from_json(circuit_to_json(circuit))
    assert back.score.dtype == dtype and torch.equal(back.score, circuit.score) and back.stderr is None


def test_nan_is_null_and_back(tmp_path):
    circuit = Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"])
    circuit = replace(circuit, score=torch.tensor([math.nan, 1.0]), result=result_of(chain_graph(1), clean=math.nan))
    circuit.save(tmp_path / "c.json")
    assert "NaN" not in (tmp_path / "c.json").read_text()
    back = Circuit.load(tmp_path / "c.json")
    assert back.score.isnan().tolist() == [True, False] and math.isnan(back.result.clean)


def test_empty_circuit_round_trip(tmp_path):
    save_circuit(Circuit.from_edges(chain_graph(1), []), tmp_path / "c.json")
    assert len(load_circuit(tmp_path / "c.json")) == 0


@pytest.mark.parametrize("name", GRAPHS)
def test_scores_round_trip(tmp_path, name):
    scores = scores_on(GRAPHS[name])
    scores.values[0, 0] = math.nan
    scores.save(tmp_path / "s.safetensors")
    back = Scores.load(tmp_path / "s.safetensors")
    assert torch.equal(back.values.view(torch.int32), scores.values.view(torch.int32))
    assert torch.equal(back.stderr, scores.stderr) and back.graph.same_as(scores.graph)
    for field in ("method", "options", "signed", "n_examples", "provenance"):
        assert getattr(back, field) == getattr(scores, field)


def test_scores_that_are_a_view_can_be_saved(tmp_path):
    scores = scores_on(chain_graph(3))
    view = replace(scores, values=scores.values.T.contiguous().T, stderr=None)
    save_scores(view, tmp_path / "s.safetensors")
    assert torch.equal(load_scores(tmp_path / "s.safetensors").values, view.values)


def test_result_round_trip(tmp_path):
    result = result_of(chain_graph(2), known={"auroc": 0.9}, faithfulness=None)
    save_result(result, tmp_path / "r.json", provenance={"versions": {"torch": "2"}, "path": tmp_path})
    assert load_result(tmp_path / "r.json") == result
    assert result_from_dict(result_to_dict(result)) == result
    assert json.loads((tmp_path / "r.json").read_text())["provenance"]["versions"] == {"torch": "2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="circuitkit.circuit/2"), "newer circuitkit.*upgrade"),
        (lambda d: d.update(schema="circuitkit.result/1"), "not a circuit file"),
        (lambda d: d.pop("schema"), "no schema"),
        (lambda d: d.pop("edges"), "edges"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["edges"][0].update(score="1.0"), "edges.0.score"),
        (lambda d: d["edges"][0].update(source="a9.h9"), "no source 'a9.h9'"),
        (lambda d: d["edges"][0].update(source="a1.h0", destination="m0"), "not a possible edge"),
        (lambda d: d["edges"].append(d["edges"][0]), "twice"),
        (lambda d: d["graph"]["mask"].pop(), "mask does not fit"),
        (lambda d: d["graph"]["mask"].__setitem__(0, "2" * 15), "mask does not fit"),
        (lambda d: d["graph"]["feeds"].append([-1, 0]), "feeds does not fit"),
        (lambda d: d["graph"]["sources"][1].update(name="input"), "twice"),
        (lambda d: d.update(dtype="int4"), "dtype"),
        (lambda d: d["result"].pop("clean"), "clean"),
        (lambda d: d["result"].update(speed=1), "unknown result fields: speed"),
    ],
)
def test_a_damaged_circuit_is_refused(saved, change, message):
    edit(saved, change)
    with pytest.raises(FormatError, match=message):
        load_circuit(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "truncated or not JSON"),
        ("[]", "expected an object"),
        ('{"schema": "circuitkit.circuit/1", "schema": "x"}', "'schema' twice"),
        ('{"schema": "circuitkit.circuit/1", "meta": NaN}', "NaN"),
        ('{"schema": "circuitkit.circuit/1", "meta": -Infinity}', "Infinity"),
        ("[" * 100_000, "nested too deep"),
        ('{"meta": ' + "9" * 5000 + "}", "too deep or too long"),
    ],
)
def test_text_that_is_not_a_circuit_is_refused(text, message):
    with pytest.raises(FormatError, match=message):
        circuit_from_json(text)


def test_every_truncation_is_refused(saved):
    whole = saved.read_text().rstrip()
    for length in range(0, len(whole), 97):
        with pytest.raises(FormatError):
            circuit_from_json(whole[:length])


@pytest.mark.parametrize("load", [load_circuit, load_scores, load_result])
def test_missing_folder_and_binary_files_are_refused(tmp_path, load):
    with pytest.raises(FormatError, match="does not exist"):
        load(tmp_path / "none")
    with pytest.raises(FormatError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    with pytest.raises(FormatError):
        load(tmp_path / "noise")


def test_damaged_scores_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    save_scores(scores_on(chain_graph(2)), path)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="truncated"):
            load_scores(path)
    save_file({"values": torch.ones(2, 2)}, path)
    with pytest.raises(FormatError, match="not a scores file"):
        load_scores(path)
    path.write_bytes(whole.replace(b"circuitkit.scores/1", b"circuitkit.scores/7"))
    with pytest.raises(FormatError, match="newer"):
        load_scores(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "x.txt", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(FormatError, match="No space left"):
                write_atomic(path, "new")
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x.txt", "new")
    assert os.listdir(tmp_path) == []


def test_writing_makes_folders_keeps_links_and_honours_the_umask(tmp_path):
    path = write_atomic(tmp_path / "a" / "b.txt", b"1")
    (tmp_path / "link").symlink_to(path)
    write_atomic(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and path.read_text() == "2"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(FormatError):
        write_atomic(tmp_path / "a", "a folder is in the way")
    with pytest.raises(FormatError):
        write_atomic(path / "below a file", "x")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
        lambda x: st.lists(x) | st.tuples(x) | st.dictionaries(st.text(), x),
    )
)
def test_jsonable_gives_json(value):
    text = json.dumps(jsonable(value), allow_nan=False)
    assert jsonable(json.loads(text)) == json.loads(text)
