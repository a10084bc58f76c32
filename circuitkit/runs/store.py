"""A run folder: circuit.json, scores.safetensors, result.json and circuit.html, complete or not there at all.

The folder is written beside its place under a hidden name and then renamed. A run that is already there is
moved aside, and removed only when the new one stands; a crash between the two moves is repaired by whoever
looks next.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuitkit.atomic import write_atomic
from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError, OptionError
from circuitkit.result import NodeScores
from circuitkit.runs.files import save_result
from circuitkit.runs.manifest import Manifest, manifest_of, read_manifest
from circuitkit.schema import result_to_dict
from circuitkit.scores import Scores

CIRCUIT, SCORES, RESULT, PAGE = "circuit.json", "scores.safetensors", "result.json", "circuit.html"
FILES = (CIRCUIT, SCORES, RESULT, PAGE)
GRAPH, GRAPH_PAGE, REPORT = "graph.json", "graph.html", "report.json"
GRAPH_FILES = (GRAPH, GRAPH_PAGE, REPORT)
_ORPHAN_SECONDS = 3600.0


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds.

    Args:
        path: the folder.
        circuit: the circuit, with its scores and its result.
        manifest: settings, versions and hashes.
    """

    path: Path
    circuit: Circuit
    manifest: Manifest

    @property
    def result(self) -> dict[str, Any]:
        """What the circuit was measured to do, as plain data, with the verdict in words."""
        assert self.circuit.result is not None
        return {**result_to_dict(self.circuit.result), "verdict": self.circuit.result.verdict}

    @property
    def page(self) -> Path:
        """The page to open in a browser."""
        return self.path / PAGE


def check_target(path: str | Path, files: Sequence[str] = FILES) -> Path:
    """The folder a run of some files may be written to, as an absolute path. Call it before computing.

    Raises:
        OptionError: if something that is not a run is there, or nothing can be written there.
    """
    target = Path(path).expanduser().resolve()
    _recover(target)
    if target.exists() and not target.is_dir():
        raise OptionError(f"{path} is a file; a run needs a folder of its own, so give another name")
    if target.is_dir():
        strangers = sorted(entry.name for entry in target.iterdir() if entry.name not in files)
        if strangers:
            raise OptionError(
                f"{path} holds files that are not a run's ({', '.join(strangers[:3])}); "
                "it is left as it is: give another folder"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        Path(_temporary(target)).rmdir()
        if target.is_dir() and not os.access(target, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise OptionError(f"cannot write to {path}: {error.strerror}; give a folder that can be written") from error
    return target


def write_run(path: str | Path, circuit: Circuit) -> Path:
    """Write a circuit that `circuitkit.find` returned as a run folder; an older run there is replaced.

    Raises:
        OptionError: if the circuit has no scores or no result, or the folder cannot be used.
    """
    if circuit.scores is None or circuit.result is None:
        raise OptionError("this circuit has no scores or no result, so it is no run; make it with circuitkit.find")
    with fresh_folder(path) as fresh:
        circuit.save(fresh / CIRCUIT)
        circuit.scores.save(fresh / SCORES)
        circuit.to_html(fresh / PAGE)
        hashes = {name: _sha256(fresh / name) for name in (CIRCUIT, SCORES, PAGE)}
        save_result(circuit.result, fresh / RESULT, provenance=manifest_of(circuit, hashes).model_dump())
    return Path(path).expanduser().resolve()


@contextlib.contextmanager
def fresh_folder(path: str | Path, files: Sequence[str] = FILES) -> Iterator[Path]:
    """A folder to fill, which takes the place of the run that may be there when all went well, and vanishes if not.

    Raises:
        OptionError: if the folder cannot be used.
    """
    target = check_target(path, files)
    fresh = Path(_temporary(target))
    try:
        yield fresh
        _swap(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        _recover(target)
        raise


def load_run(path: str | Path) -> RunFolder:
    """Read a run from its folder, or from its circuit.json.

    Raises:
        FormatError: if files are missing, changed since they were written, or of a newer version.
    """
    folder = Path(path).expanduser().resolve()
    folder = folder.parent if folder.name in FILES else folder
    _recover(folder)
    if not folder.is_dir():
        raise FormatError(f"no run at {path}; write one with: circuitkit find MODEL TASK --out {path}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FormatError(f"{path} is not a complete run: {', '.join(missing)} missing")
    manifest = read_manifest(folder / RESULT)
    for name in (CIRCUIT, SCORES):
        if manifest.files.get(name) != _sha256(folder / name):
            raise FormatError(f"{folder / name} is not the file that this run wrote (its sha256 differs); run it again")
    circuit = replace(Circuit.load(folder / CIRCUIT), scores=Scores.load(folder / SCORES))
    return RunFolder(folder, circuit, manifest)


def circuit_file(path: str | Path) -> Path:
    """The circuit.json that a user means by a run folder or by the file itself."""
    return Path(path) / CIRCUIT if Path(path).is_dir() else Path(path)


def feature_graph_file(path: str | Path) -> Path | None:
    """The file of a feature graph that a user means by a folder or by the file itself; None if it is a circuit's."""
    file = Path(path) / GRAPH if Path(path).is_dir() else Path(path)
    if not file.is_file() or Path(path, CIRCUIT).is_file():
        return None
    return file if file.suffix == ".json" and '"links"' in file.read_text(encoding="utf-8", errors="ignore") else None


def page_of(path: str | Path) -> Path:
    """The page of a run. Raises FormatError if there is none."""
    folder = circuit_file(path).parent
    for page in (folder / PAGE, folder / GRAPH_PAGE):
        if page.is_file():
            return page.resolve()
    if not Path(path).exists():
        raise FormatError(f"{path} does not exist; give a folder that circuitkit find --out or circuitkit graph wrote")
    if feature_graph_file(path):
        raise FormatError(f"{path} is a graph's file; make its page with: circuitkit export {path} page.html")
    raise FormatError(f"no {PAGE} in {folder}; give a folder that circuitkit find --out or circuitkit graph wrote")


def write_scores(path: str | Path, scores: Scores | NodeScores) -> None:
    """Write scores of edges as safetensors; scores of components, which are a small table, as CSV."""
    if isinstance(scores, NodeScores):
        write_atomic(path, scores.to_pandas().to_csv())
    else:
        scores.save(path)


def check_file(path: str | Path) -> None:
    """Refuse, before computing, a file that could not be written. Raises OptionError."""
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise OptionError(f"{path} is a folder; give the name of a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}."):
            pass
    except OSError as error:
        raise OptionError(
            f"cannot write to {path}: {error.strerror}; give a file in a folder that can be written"
        ) from error


def _temporary(target: Path) -> str:
    folder = tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent)
    os.chmod(folder, 0o755)
    return folder


def _swap(fresh: Path, target: Path) -> None:
    """Put ``fresh`` in the place of ``target``; another process may be doing the same."""
    for _ in range(20):
        aside = Path(tempfile.mktemp(prefix=f".{target.name}.old-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):
            os.rename(target, aside)
        try:
            os.rename(fresh, target)
        except OSError:
            if not target.exists():
                raise
            continue
        finally:
            if target.exists():
                shutil.rmtree(aside, ignore_errors=True)
        return
    raise OptionError(f"another process keeps writing {target}; give this run a folder of its own")


def _recover(target: Path) -> None:
    """Put back the run that a crash left moved aside."""
    if not target.exists() and target.parent.is_dir():
        kept = sorted(target.parent.glob(f".{target.name}.old-*"), key=lambda entry: entry.stat().st_mtime)
        if kept:
            with contextlib.suppress(OSError):
                os.rename(kept[-1], target)


def _sweep(target: Path) -> None:
    """Remove what killed processes left behind, once it is old enough to belong to nobody."""
    now = time.time()
    for pattern in (f".{target.name}.new-*", f".{target.name}.old-*"):
        for entry in target.parent.glob(pattern):
            with contextlib.suppress(OSError):
                if now - entry.stat().st_mtime > _ORPHAN_SECONDS:
                    shutil.rmtree(entry, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
