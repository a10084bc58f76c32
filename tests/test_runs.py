"""Run folders: complete or not there, never in the way of what somebody else wrote, checked when read."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from circuitkit.errors import FormatError, OptionError
from circuitkit.graph import chain_graph
from circuitkit.result import Result
from circuitkit.runs import store
from circuitkit.runs.manifest import manifest_of
from circuitkit.runs.options import Option, options_of, read_options
from circuitkit.runs.provenance import data_sha256, model_sha256
from circuitkit.runs.store import FILES, check_file, check_target, load_run, page_of, write_run
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


def example(edges: int = 4, **meta):
    graph = chain_graph(3)
    values = torch.arange(16.0).reshape(4, 4).masked_fill(~graph.mask, 0)
    scores = Scores(values, graph, "eap", {"steps": 3}, stderr=values / 10, n_examples=8)
    result = Result(
        "pairs",
        "logit-diff",
        "counterfactual",
        2.0,
        0.0,
        1.5,
        0.75,
        (0.7, 0.8),
        0.1,
        (0.0, 0.2),
        edges,
        10,
        8,
    )
    about = {
        "model": "tiny",
        "task": "pairs",
        "n": 8,
        "metric": "logit-diff",
        "method": "eap",
        "options": {"steps": 3},
        "selection": "top",
        "edges": edges,
        "seed": 0,
        "model_sha256": "0" * 64,
        "data_sha256": "1" * 64,
        "example": {"clean": ["a", "<b>"], "right": ["c"]},
    }
    return replace(scores.top(edges), result=result, meta=about | meta)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_run_comes_back_as_it_was(tmp_path):
    circuit = example()
    folder = write_run(tmp_path / "deep" / "run", circuit)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    run = load_run(folder)
    assert run.circuit.edge_names() == circuit.edge_names()
    assert run.circuit.result == circuit.result
    assert torch.equal(run.circuit.scores.values, circuit.scores.values)
    assert run.manifest.model_dump(exclude={"files"}) == manifest_of(circuit).model_dump(exclude={"files"})
    assert load_run(folder / "circuit.json").path == folder
    assert page_of(folder) == folder / "circuit.html"
    assert leftovers(tmp_path / "deep") == []


def test_an_older_run_is_replaced(tmp_path):
    write_run(tmp_path / "run", example(4))
    write_run(tmp_path / "run", example(2))
    assert len(load_run(tmp_path / "run").circuit) == len(example(2)) < len(example(4))
    assert leftovers(tmp_path) == []


def test_the_older_run_stays_when_writing_fails(tmp_path, monkeypatch):
    write_run(tmp_path / "run", example(4))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_result", full)
    with pytest.raises(OSError, match="No space"):
        write_run(tmp_path / "run", example(2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert leftovers(tmp_path) == []


def test_a_failing_rename_puts_the_older_run_back(tmp_path, monkeypatch):
    write_run(tmp_path / "run", example(4))
    rename = os.rename

    def no_new(source, target):
        if ".new-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", no_new)
    with pytest.raises(OSError, match="Input/output"):
        write_run(tmp_path / "run", example(2))
    monkeypatch.undo()
    assert len(load_run(tmp_path / "run").circuit) == len(example(4))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["check_target", "load_run"])
def test_a_crash_between_the_two_moves_is_repaired(tmp_path, name):
    write_run(tmp_path / "run", example(4))
    os.rename(tmp_path / "run", tmp_path / ".run.old-abc")
    getattr(store, name)(tmp_path / "run")
    assert len(load_run(tmp_path / "run").circuit) == len(example(4))


def test_what_killed_processes_left_is_swept_when_it_is_old(tmp_path):
    for name, age in ((".run.new-old", 7200), (".run.new-young", 60)):
        (tmp_path / name).mkdir()
        when = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (when, when))
    check_target(tmp_path / "run")
    assert leftovers(tmp_path) == [".run.new-young"]


def test_many_processes_may_write_the_same_run(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_runs import example; "
        "from circuitkit.runs.store import write_run\n"
        "for _ in range(5): write_run(sys.argv[2], example(int(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "run")]
    running = [subprocess.Popen([*command, str(edges)]) for edges in (2, 4)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(load_run(tmp_path / "run").circuit) in (len(example(2)), len(example(4)))
    assert leftovers(tmp_path) == []


def test_a_folder_that_is_not_a_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(OptionError, match=r"chapter1\.tex"):
        check_target(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_run_with_somebody_s_notes_in_it_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", example())
    (folder / "notes.md").write_text("do not lose me")
    with pytest.raises(OptionError, match=r"notes\.md"):
        write_run(folder, example(2))
    assert len(load_run(folder).circuit) == len(example(4))


def test_files_and_places_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is a file"):
        check_target(tmp_path / "file")
    with pytest.raises(OptionError, match="cannot write"):
        check_target(tmp_path / "file" / "run")
    with pytest.raises(OptionError, match="cannot write"):
        check_target("/proc/circuitkit/run")
    with pytest.raises(OptionError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(OptionError, match="cannot write"):
        check_file("/proc/circuitkit/scores.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OptionError, match="cannot write"):
        check_target(tmp_path / "run")


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert len(load_run(write_run(tmp_path / "run", example())).circuit) == len(example())


def test_a_changed_file_is_noticed(tmp_path):
    folder = write_run(tmp_path / "run", example())
    text = (folder / "circuit.json").read_text()
    (folder / "circuit.json").write_text(text.replace("15.0", "51.0"))
    with pytest.raises(FormatError, match="sha256 differs"):
        load_run(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "run", example())
    (folder / name).unlink()
    with pytest.raises(FormatError, match=name):
        load_run(folder)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no run at"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"no circuit\.html"):
        page_of(tmp_path)
    folder = write_run(tmp_path / "run", example())
    data = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(data | {"schema": "circuitkit.result/99"}))
    with pytest.raises(FormatError, match="newer circuitkit"):
        load_run(folder)
    (folder / "result.json").write_text(json.dumps(data | {"provenance": {"model": 3}}))
    with pytest.raises(FormatError, match="model"):
        load_run(folder)
    (folder / "result.json").write_text("{")
    with pytest.raises(FormatError, match="truncated"):
        load_run(folder)


def test_a_circuit_that_was_not_found_cannot_be_a_run(tmp_path):
    with pytest.raises(OptionError, match="no scores or"):
        write_run(tmp_path / "run", replace(example(), result=None))
    with pytest.raises(OptionError, match="where it came from"):
        write_run(tmp_path / "run", replace(example(), meta={}))
    assert list(tmp_path.iterdir()) == []


KNOWN = {
    "steps": Option("steps", int, 5),
    "rule": Option("rule", str, "midpoint"),
    "fold": Option("fold", bool, True),
    "limit": Option("limit", float | None, None),
}


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("", {}),
        ("--steps 3 --rule left", {"steps": 3, "rule": "left"}),
        ("--steps=-3", {"steps": -3}),
        ("--fold", {"fold": True}),
        ("--no-fold", {"fold": False}),
        ("--fold=no", {"fold": False}),
        ("--limit 0.5", {"limit": 0.5}),
        ("--limit none", {"limit": None}),
    ],
)
def test_options_are_read(typed, values):
    assert read_options(typed.split(), KNOWN, "the method") == values


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--stesp 3", "did you mean --steps"),
        ("--zzz", "Options: --steps, --rule"),
        ("--steps", "needs a value: a whole number"),
        ("--steps three", "expected a whole number"),
        ("--fold=perhaps", "expected true or false"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_options_that_cannot_be_are_refused(typed, message):
    with pytest.raises(OptionError, match=message):
        read_options(typed.split(), KNOWN, "the method")


def test_every_option_of_what_is_registered_can_be_typed():
    from circuitkit.methods.base import METHODS
    from circuitkit.tasks.base import TASKS

    for registry in (METHODS, TASKS):
        for name, thing in registry.items():
            for option in options_of(thing).values():
                assert option.expects, f"{name} {option.flag}"
                if option.default is not None and not isinstance(option.default, bool):
                    typed = read_options([option.flag, str(option.default)], {option.name: option}, name)
                    assert typed == {option.name: option.default}, f"{name} {option.flag}"


def test_the_hash_of_a_model_is_of_its_weights_only():
    one, two = torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    two[0].load_state_dict(one.state_dict())
    torch.nn.init.zeros_(two[1].weight)
    torch.nn.init.zeros_(two[1].bias)
    assert model_sha256(one) == model_sha256(two)
    with torch.no_grad():
        two[0].bias[0] += 1e-6
    assert model_sha256(one) != model_sha256(two)


def test_the_hash_of_the_data_sees_every_token_and_the_metric():
    clean = torch.tensor([[1, 2, 3], [4, 5, 6]])
    corrupt = clean.flip(0)
    task = Task.from_tokens(clean, corrupt, torch.tensor([1, 2]), torch.tensor([3, 4]))
    again = Task.from_tokens(clean.clone(), corrupt, torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert data_sha256(task) == data_sha256(again)
    clean[0, 0] = 7
    other = Task.from_tokens(clean, corrupt, torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert len({data_sha256(t) for t in (again, other, again.with_metric("prob-diff"))}) == 3
