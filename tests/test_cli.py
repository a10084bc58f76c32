"""The command line, run for real: what it prints, what it writes, and how it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from circuitkit.circuit import Circuit
from circuitkit.cli import main
from circuitkit.runs.store import FILES, load_run

ROOT = Path(__file__).parent.parent
FIND = "find induction/trained induction-letters --method exact --n 16 --edges 6 --no-progress"


def typed(text: str) -> list[str]:
    return text.split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*typed(FIND), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def one_line(capsys) -> str:
    """The one line that a failing command leaves on stderr; nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("circuitkit: "), err
    return lines[0]


def test_find_writes_a_run_and_says_what_it_measured(run, capsys):
    assert sorted(path.name for path in run.iterdir()) == sorted(FILES)
    assert main([*typed(FIND), "--out", "again"]) == 0
    out = capsys.readouterr().out
    for word in (
        "edges",
        "of 12",
        "faithfulness",
        "random circuits",
        "clean",
        "corrupt",
        "seconds",
        "again/circuit.html",
    ):
        assert word in out, out
    assert load_run("again").circuit.edge_names() == load_run(run).circuit.edge_names()


def test_find_on_a_language_model(capsys):
    command = "find stories260k gender-pronoun --method eap --n 6 --edges 20 --out runs/pronoun --json --no-progress"
    assert main(typed(command)) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"] == "stories260k" and data["result"]["n_edges"] <= 20 and data["n"] == 6
    assert Circuit.load("runs/pronoun/circuit.json").meta["example"]["clean"]


def test_find_remembers_everything_that_was_asked(run):
    manifest = load_run(run).manifest
    assert (manifest.model, manifest.task, manifest.method) == ("induction/trained", "induction-letters", "exact")
    assert (manifest.n, manifest.seed, manifest.edges) == (16, 0, 6)
    assert len(manifest.model_sha256) == len(manifest.data_sha256) == 64
    assert {"python", "torch", "circuitkit-discovery"} <= set(manifest.versions)


def test_a_method_s_and_a_task_s_arguments_are_options():
    command = "--method eap-ig --steps 3 --rule left --corrupt moved --out run --no-progress --n 8 --edges 4"
    assert main(["find", "induction/trained", "induction-letters", *typed(command)]) == 0
    manifest = load_run("run").manifest
    assert manifest.options["steps"] == 3 and manifest.options["rule"] == "left"
    assert manifest.task_options == {"corrupt": "moved"}


def test_the_default_folder_says_what_is_in_it():
    assert main(typed("find induction/trained induction-letters --method eap --n 4 --edges 3 --no-progress")) == 0
    assert Path("runs/trained-induction-letters-eap/circuit.json").is_file()


def test_eval_repeats_what_find_measured(run, capsys):
    assert main(["eval", str(run), "--json", "--no-progress"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["note"] == ""
    assert data["result"]["faithfulness"] == pytest.approx(load_run(run).circuit.result.faithfulness, abs=1e-6)


def test_eval_says_when_the_data_differ(run, capsys):
    assert main(["eval", str(run / "circuit.json"), "--seed", "1", "--no-progress"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "faithfulness" in out and "the pairs or the metric are not those" in out


def test_eval_on_another_model_says_so(run, capsys):
    assert main(["eval", str(run), "--model", "induction/damaged", "--no-progress"]) == 0
    assert "the weights are not those" in " ".join(capsys.readouterr().out.split())


def test_eval_refuses_another_graph(run, capsys):
    assert main(["eval", str(run), "--model", "stories260k", "--task", "gender-pronoun", "--n", "4"]) == 2
    assert "graph" in one_line(capsys)


def test_score_writes_scores_only(capsys):
    command = "score induction/trained induction-letters --method exact --n 8 --out s.safetensors --no-progress"
    assert main(typed(command)) == 0
    assert "a0.h0->a1.h0<k>" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir()] == ["s.safetensors"]


def test_score_of_components_is_a_table(capsys):
    command = "score induction/trained induction-letters --method activation-patching --site head --n 8 --out s.csv"
    assert main(typed(command)) == 0
    assert "effect on the metric" in capsys.readouterr().out
    assert Path("s.csv").read_text().count("\n") >= 3


@pytest.mark.parametrize(
    ("options", "says"),
    [("--length 40", "l0.h"), ("--nodes each", "the 20 strongest of 288"), ("--length 4", "end")],
)
def test_every_number_of_a_table_of_components_can_be_read(options, says, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = f"score toys/flip-flop_gru_s0 flip-flop --method state-patching --n 8 --out s.csv --no-progress {options}"
    assert main(typed(command)) == 0
    out = capsys.readouterr().out
    assert says in out and "…" not in out and "..." not in out
    cells = [word for line in out.splitlines()[2:-1] for word in line.split() if word[0] == "+"]
    assert cells and all(float(cell) for cell in cells if cell != "+0")


def test_a_warning_is_one_line_without_our_files(capsys):
    command = "find toys/flip-flop_gru_s0 flip-flop --steps 1 --n 8 --edges 20 --no-progress --out run"
    assert main(typed(command)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: the scores of the input's edges add up to"), lines
    assert ".py" not in lines[0] and "steps=8" in lines[0]


def test_export_and_view(run, capsys):
    assert main(["export", str(run / "circuit.json"), "out/circuit.graphml"]) == 0
    assert Path("out/circuit.graphml").stat().st_size > 100
    capsys.readouterr()
    assert main(["view", str(run), "--no-open"]) == 0
    assert Path(capsys.readouterr().out.strip()) == run / "circuit.html"


@pytest.mark.parametrize("kind", ["models", "tasks", "methods", "formats"])
def test_list_names_things(kind, capsys):
    assert main(["list", kind, "--options"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["list", kind, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[kind]


def test_help_on_a_method_has_its_formula_and_options(capsys):
    assert main(["help", "eap-ig"]) == 0
    out = capsys.readouterr().out
    assert "score(u -> v)" in out and "--steps" in out and "arXiv:2403.17806" in out


@pytest.mark.parametrize("name", ["flip-flop", "state-patching"])
def test_help_has_the_line_of_the_list_and_says_what_options_mean(name, capsys):
    assert main(["list", "tasks" if name == "flip-flop" else "methods", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out).values()
    assert main(["help", name]) == 0
    text, _, options = capsys.readouterr().out.partition("\nOptions\n")
    assert text.splitlines()[2] == listed[name]["line"]
    assert all("): " in line for line in options.strip().splitlines()), options


def test_the_list_of_models_says_what_each_is(capsys):
    assert main(["list", "models", "--json"]) == 0
    lines = {name: entry["line"] for name, entry in json.loads(capsys.readouterr().out)["models"].items()}
    assert all(lines.values()), [name for name, line in lines.items() if not line]
    assert lines["word-breaks/thai_h15"] == "bidirectional LSTM, 15 units, of Unicode; task word-break"
    assert lines["toys/parity_lstm_s0"] == "LSTM, 32 units; task parity"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("find stories260 gender-pronoun --method eap", "stories260"),
        ("find stories260k gender-pronun", "did you mean 'gender-pronoun'"),
        ("find stories260k gender-pronoun --method eap-gi", "did you mean 'eap-ig'"),
        ("find stories260k gender-pronoun --method eap-ig --stesp 4", "did you mean --steps"),
        ("find stories260k gender-pronoun --method eap-ig --steps many", "expected a whole number"),
        ("find stories260k gender-pronoun --metric logit", "logit"),
        ("find stories260k gender-pronoun --method activation-patching", "not edges"),
        ("find toys/flip-flop_gru_s0 flip-flop --method state-patching", "use circuitkit.score, or one of acdc, clean"),
        ("find toys/flip-flop_gru_s0 flip-flop --group cell", "'--group': 'cell' is not one of"),
        ("find stories260k flip-flop", "is a transformer that reads a token id at each step and has 512 outputs; this"),
        ("find stories260k flip-flop", "needs a recurrent network that reads numbers and has as many outputs as it"),
        ("find toys/parity_gru_s0 integrator", "reads 1 number at each step and has 1 output: use"),
        ("find stories260k gender-pronoun --batch-size some", "batch_size"),
        ("find stories260k gender-pronoun --budget lots", "budget"),
        ("find stories260k gender-pronoun --edges 0", "--edges"),
        ("find induction/trained induction-letters --edges 500 --n 4", "1 to 12"),
        ("find induction/trained induction-letters --n 0", "--n"),
        ("find stories260k", "Missing argument"),
        ("fnd stories260k gender-pronoun", "find"),
        ("list method", "methods"),
        ("help eapig", "did you mean"),
        ("eval nowhere", "nowhere"),
        ("export nowhere.json out.graphml", "nowhere.json"),
        ("view nowhere", "does not exist"),
        ("score induction/trained induction-letters --out /proc/circuitkit/s.safetensors", "cannot write"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(command, says, capsys):
    assert main(typed(command)) == 2
    assert says in one_line(capsys)
    assert not list(Path().rglob("circuit.json"))


def test_a_bad_format_is_an_error_of_one_line(run, capsys):
    assert main(["export", str(run), "circuit.pdf"]) == 2
    assert "pdf" in one_line(capsys)
    assert list(Path().iterdir()) == []


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="did you mean"):
        main(typed("find stories260k gender-pronun --debug"))


def test_a_folder_that_is_not_a_run_is_refused_before_computing(capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("circuitkit.runs.request.load", never)
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("years of work")
    for out in ("thesis", "thesis/chapter1.tex", "/proc/circuitkit/run"):
        assert main([*typed(FIND), "--out", out]) == 2
        one_line(capsys)
    assert Path("thesis/chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize(("blow", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_leaves_the_older_one(run, blow, code):
    """Stopped while it writes: the slow page below is the moment between the first file and the last."""
    assert main([*typed(FIND), "--out", "run"]) == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    slow = (
        "import sys, time, circuitkit.circuit as c\n"
        "def slowly(self, path): sys.stderr.write('NOW'); sys.stderr.flush(); time.sleep(60)\n"
        "c.Circuit.to_html = slowly\n"
        "from circuitkit.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", slow, *typed(FIND), "--out", "run", "--seed", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stderr is not None
    seen, limit = b"", time.monotonic() + 120
    while b"NOW" not in seen and time.monotonic() < limit and process.poll() is None:
        seen += process.stderr.read1(1000)
    process.send_signal(blow)
    assert process.wait(timeout=60) == code, seen
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    if blow != signal.SIGKILL:
        assert [path.name for path in Path().iterdir()] == ["run"]
    assert load_run("run").manifest.seed == 0
