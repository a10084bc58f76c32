"""The wheel holds what the package needs at run time, and nothing big."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_every_data_file_is_inside(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"circuitkit/{path.relative_to(ROOT)}" for path in (ROOT / "data").rglob("*") if path.is_file()}
    assert wanted <= inside, sorted(wanted - inside)[:5]


def test_every_package_file_is_inside(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "circuitkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {str(path.relative_to(ROOT)) for path in files}
    assert wanted <= inside, sorted(wanted - inside)[:5]


def test_licences_are_inside(wheel):
    inside = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    for folder in (ROOT / "data").iterdir():
        assert f"circuitkit/data/{folder.name}/README.md" in inside, f"{folder.name} has no README with its licence"


def test_it_has_one_command_and_a_sane_size(wheel):
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "circuitkit = circuitkit.cli:main" in archive.read(entry).decode()
    assert wheel.stat().st_size < 25 * 1024**2
    assert not [name for name in archive.namelist() if name.startswith(("tests/", "notebooks/"))]
