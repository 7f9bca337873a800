"""Commands that notebooks give: the package they find is this one, mistakes are one line, what is there is not made again."""

import json
import pathlib

import pytest

from a1jax import __version__, provenance
from a1jax.analysis import made
from a1jax.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_command_runs_this_package_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert made.command(["--version"]).split()[-1] == __version__
    assert made.PACKAGE == str(ROOT)


def test_a_mistake_is_one_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        made.command(["run", str(tmp_path / "nothing.py")])
    assert "nothing" in str(caught.value) and "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_run_that_is_there_is_not_made_again(tmp_path, monkeypatch):
    file, calls = tmp_path / "small.py", []
    file.write_text("")
    monkeypatch.setattr(made, "command", lambda words: calls.append(words))
    folder = made.run(None, f"{file}:smoke", tmp_path / "runs", ("seed=1",))
    assert folder.parent == tmp_path / "runs" and folder.name.startswith("small-smoke-")
    assert calls == [["run", f"{file}:smoke", "--workdir", str(folder), "--set", "seed=1"]]
    folder.mkdir(parents=True)
    (folder / provenance.FILE).write_text(json.dumps({"outcome": "interrupted"}))
    made.run(None, f"{file}:smoke", tmp_path / "runs", ("seed=1",))
    assert len(calls) == 2  # goes on
    (folder / provenance.FILE).write_text(json.dumps({"outcome": "finished"}))
    assert made.run(None, f"{file}:smoke", tmp_path / "runs", ("seed=2",)) != folder and len(calls) == 3  # another run
    calls.pop()
    assert made.run(None, f"{file}:smoke", tmp_path / "runs", ("seed=1",)) == folder and len(calls) == 2
    assert made.run(folder, "not/looked/at.py", tmp_path) == folder


def test_folders_and_experiments_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match="not there; give the folder of a run, or None"):
        made.run(tmp_path / "no", "x.py", tmp_path)
    with pytest.raises(ConfigError, match="no such experiment from"):
        made.run(None, str(tmp_path / "no.py:smoke"), tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '{"command": 1}', '{"command": ["other"], "printed": {}}'])
def test_a_file_of_something_else_is_made_again(tmp_path, monkeypatch, content):
    path = tmp_path / "new" / "x.json"
    path.parent.mkdir()
    path.write_text(content)
    monkeypatch.setattr(made, "command", lambda words, good: '{"a": 1}')
    assert made.saved(path, ["compile"]) == {"a": 1}
    assert json.loads(path.read_text()) == {"command": ["compile"], "printed": {"a": 1}}
