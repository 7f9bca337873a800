"""The wheel: what is in it, what is not, and that kernels import from it and from the checkout alike."""

import email
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))


def _pip(command, *words):
    """Without the network."""
    line = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", ".git", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)
    _pip("wheel", "--no-build-isolation", "-w", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def test_there_are_ops_to_package():
    assert "vocab_align" in OPS
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would hide the PyPI package of that name


def test_the_wheel_holds_the_package_and_the_ops_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("a1jax/**/*.py")}
    sources |= {f"a1jax/{path.relative_to(ROOT)}" for op in OPS for path in ROOT.glob(f"kernels/{op}/*.py")}
    assert sources <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"a1jax", next(top for top in tops if top.endswith(".dist-info"))}


def test_the_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    inside = {pathlib.PurePath(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(archive.read(inside["METADATA"]))
    needs = metadata.get_all("Requires-Dist")
    assert "jax>=0.10.2" in needs and metadata["Requires-Python"] == ">=3.11" and "LICENSE" in inside
    assert not [need for need in needs if need.split()[0].lower() in ("tensorflow", "torch")]
    assert "a1jax = a1jax.main:main" in archive.read(inside["entry_points.txt"]).decode()


_IMPORT = """
import importlib, pathlib, sys
import a1jax.kernels
for op in sys.argv[2:]:
    found = importlib.import_module(f"a1jax.kernels.{op}")
    assert pathlib.Path(found.__file__).resolve().is_relative_to(pathlib.Path(sys.argv[1]).resolve()), found.__file__
"""


def test_ops_import_from_the_installed_wheel(wheel, tmp_path):
    """Into a site folder that also holds somebody else's package named kernels."""
    _pip("install", "--target", tmp_path / "site", wheel)
    (tmp_path / "site" / "kernels").mkdir()
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("")
    for op in ("not_ours", *OPS):
        (tmp_path / "site" / "kernels" / op).mkdir()
        (tmp_path / "site" / "kernels" / op / "__init__.py").write_text("raise ImportError('somebody else')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-P", "-c", _IMPORT, str(tmp_path / "site" / "a1jax"), *OPS]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "not_ours"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "No module named 'a1jax.kernels.not_ours'" in done.stderr


def test_ops_import_from_the_checkout_inside_and_outside(tmp_path):
    for op in OPS:
        assert pathlib.Path(importlib.import_module(f"a1jax.kernels.{op}").__file__) == ROOT / "kernels" / op / "__init__.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _IMPORT, str(ROOT / "kernels"), *OPS]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def _ci(folder, readme, **more):
    """Runs a copy of the script beside a README; what it printed, its exit status, and what is left of its environment."""
    for name in (".ci", "tmp"):
        (folder / name).mkdir()
    script = shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(readme)
    env = {**os.environ, "TMPDIR": str(folder / "tmp"), "PIP_NO_INDEX": "1", **more}
    done = subprocess.run([script], capture_output=True, text=True, env=env, cwd="/")
    return done, list((folder / "tmp").iterdir())


def test_ci_needs_the_line_of_the_readme(tmp_path):
    done, left = _ci(tmp_path, "pip install -e . && pytest\n")
    assert done.returncode == 1 and "no test line in README.md" in done.stderr and left == []


FAKE = """#!/usr/bin/env bash
# A Python whose environments are made of copies of itself, and which writes down what is asked of any of them.
echo "$(basename "$0") $*" >> "$CALLS"
if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$3/bin" && for name in python pip pytest ruff; do cp "$0" "$3/bin/$name"; done; fi
[[ "$1 $2" != "-m pytest" ]] || exit ${QUICK:-0}
"""


@pytest.mark.parametrize(("found", "code"), [("", 0), ("1", 0), ("0", 0), ("0", 1)])
def test_ci_runs_the_quick_tests_on_a_newer_python_where_there_is_one(tmp_path, found, code):
    """``found``: the exit status of the python3.12 on PATH; where it only complains, pyenv's own folder is looked into."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    pyenv = tmp_path / "home/.pyenv/versions/3.12.9/bin"
    for place, name, text in (
        (folder, "python3", FAKE),
        (folder, "python3.12", FAKE if found == "0" else "#!/bin/sh\nexit 1\n"),
        (pyenv, "python3.12", FAKE if found == "1" else "#!/bin/sh\nexit 1\n"),
    ):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).write_text("")
    for name in ("a1jax", "kernels"):
        (tmp_path / name).mkdir()
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "CALLS": str(calls)}
    done, left = _ci(tmp_path, 'pip install -e ".[test]" && pytest\n', **environment, PYTHON="python3", QUICK=str(code))
    assert done.returncode == code and left == [], done.stderr
    made = [line.split()[:5] for line in calls.read_text().splitlines() if "-c" not in line]
    made.sort(key=lambda words: words[0] in ("python3.12", "python"))  # its environment is made beside the tests
    first = ["python3 -m venv", "pip install -e .[test]", "pytest", "ruff check"]
    second = ["python3.12 -m venv", "python -m pip install --quiet", "python -m pytest -m quick"] if found else []
    assert [" ".join(words[: len(want.split())]) for words, want in zip(made, first + second, strict=True)] == first + second
    assert ("no python3.12" in done.stdout) == (not found)


@pytest.mark.slow
def test_ci_runs_the_whole_line_in_a_fresh_environment(tmp_path):
    """With nothing to install from, the line fails; what follows it on the line tells where it ran."""
    line = 'pip install -e ".[test]" && pytest || { echo ran in "$(which python)"; pip list --format=freeze; exit 3; }'
    home = str(tmp_path / "home")  # where no newer Python is found, whose environment would be made beside it
    done, left = _ci(tmp_path, f"To test:\n\n    {line}\n", HOME=home, PYTHON=sys.executable)
    assert done.returncode == 3 and left == []
    assert f"ran in {tmp_path / 'tmp'}/" in done.stdout and "pip==" in done.stdout and "jax==" not in done.stdout
