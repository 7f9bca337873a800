"""The command line: exit codes, one line for the user's mistakes and nothing written then, what a run leaves behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import a1jax
from a1jax import config, main, provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Importable by name, as a stage's code is: a saved config refers to it.
HOME = """
import dataclasses, pathlib, time
from a1jax.config import Binding, ConfigError, bind

@dataclasses.dataclass(frozen=True)
class Mesh:
    shape: dict[str, int] = dataclasses.field(default_factory=dict)

@dataclasses.dataclass(frozen=True)
class Experiment:
    name: str
    main: Binding
    steps: int = 3
    seed: int = 11
    rate: float = 0.5
    mesh: Mesh = Mesh()

    def __post_init__(self):
        if self.steps == 13:
            raise ConfigError("steps must not be 13")

def work(cfg, workdir, fail=""):
    assert (workdir / "config.py").exists() and (workdir / "run.json").exists()
    if fail == "early":
        (workdir / "metrics.jsonl").touch()
        raise ConfigError("no such data")
    with open(workdir / "out.txt", "a") as file:
        file.write(f"{cfg.steps} {cfg.rate}\\n")
    if fail == "config":
        raise ConfigError("found late:\\n no data")
    if fail == "interrupt":
        raise KeyboardInterrupt
    if fail == "wait":
        time.sleep(60)
    if fail:
        raise ValueError(fail)
"""

EXPERIMENT = '''
"""An experiment."""
from a1jax.config import ConfigError, bind
from a1jax_test_main_home import Experiment, work

def get_config(arg=""):
    if arg not in ("", "big"):
        raise ConfigError(f"unknown arg {arg!r}; known: big")
    return Experiment(name="tiny", main=bind(work), steps=100 if arg else 3)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with exp.py, current, and with what exp.py imports on the path (also of child processes)."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a1jax_test_main_home.py").write_text(HOME)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "exp.py").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "lib"), str(ROOT)]))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "work"
    sys.modules.pop("a1jax_test_main_home", None)


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _refused(capsys, *argv):
    """The line that a mistake is answered with."""
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("a1jax: ") and err.count("\n") == 1
    return err


def test_a_run_leaves_its_config_and_where_it_came_from(here):
    assert main.main(["run", "exp.py", "--set", "rate=0.25", "steps=5", "--set=seed=12"]) == 0
    assert _files(here) == ["exp.py", "runs/tiny/config.py", "runs/tiny/out.txt", "runs/tiny/run.json"]
    assert (here / "runs/tiny/out.txt").read_text() == "5 0.25\n"
    cfg = config.load("runs/tiny/config.py")
    assert (cfg.steps, cfg.rate, cfg.seed) == (5, 0.25, 12)
    entry = json.loads((here / "runs/tiny/run.json").read_text())
    assert entry["command"] == "a1jax run exp.py --set rate=0.25 steps=5 --set=seed=12"
    assert entry["seed"] == 12 and entry["outcome"] == "finished" and entry["seconds"] >= 0 and entry["earlier"] == []
    assert entry["versions"]["a1jax"] == a1jax.__version__ and entry["versions"]["jax"] and entry["machine"]["cores"] >= 1
    assert "commit" in entry and entry["devices"].startswith("8 x ")
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True)
    if (ROOT / ".git").exists() and done.returncode == 0:
        assert entry["commit"] == done.stdout.strip()


def test_the_same_run_goes_on_and_its_saved_config_runs_again(here):
    assert main.main(["run", "exp.py:big", "--workdir", "w"]) == 0
    assert main.main(["run", "exp.py", "--workdir", "w", "--set", "steps=100"]) == 0  # the same config by another way
    assert main.main(["run", "w/config.py", "--workdir", "w"]) == 0
    assert (here / "w/out.txt").read_text() == "100 0.5\n" * 3
    entry = provenance.read("w")
    assert [start["command"].split()[2] for start in [*entry["earlier"], entry]] == ["exp.py:big", "exp.py", "w/config.py"]
    assert all("earlier" not in start for start in entry["earlier"])
    assert main.main(["run", "w/config.py"]) == 0
    assert (here / "runs/tiny/out.txt").exists()


def test_another_config_in_the_workdir_is_refused(here, capsys):
    assert main.main(["run", "exp.py", "--workdir", "w"]) == 0
    before = {name: (here / name).read_bytes() for name in _files(here)}
    line = _refused(capsys, "run", "exp.py:big", "--workdir", "w", "--set", "rate=2", "seed=1", "name=x")
    for part in ("w: holds a run of another config", "name: 'tiny' -> 'x'", "steps: 3 -> 100", "seed: 11 -> 1", "and 1 more", "--workdir"):
        assert part in line
    (here / "w/config.py").write_text("import gone\n")
    assert "cannot be compared" in _refused(capsys, "run", "exp.py", "--workdir", "w")
    (here / "w/config.py").write_bytes(before["w/config.py"])
    assert {name: (here / name).read_bytes() for name in _files(here)} == before


def test_a_run_goes_on_under_another_mesh_and_its_config_says_which(here, capsys):
    def shape():
        return config.load("w/config.py").mesh.shape

    assert main.main(["run", "exp.py", "--workdir", "w", "--set", "mesh.shape={'fsdp': 8}"]) == 0
    assert main.main(["run", "exp.py", "--workdir", "w", "--set", "mesh.shape={'expert': 4}"]) == 0
    assert shape() == {"fsdp": 8}  # it was finished: its config keeps the mesh it ran on
    provenance.finish(pathlib.Path("w"), "interrupted")
    assert main.main(["run", "exp.py", "--workdir", "w", "--set", "mesh.shape={'expert': 4}"]) == 0
    assert shape() == {"expert": 4} and (here / "w/out.txt").read_text() == "3 0.5\n" * 3
    assert "holds a run of another config" in _refused(capsys, "run", "exp.py", "--workdir", "w", "--set", "mesh.shape={}", "seed=1")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["nope.py"], "nope.py: no such file"),
        (["exp.py:huge"], "unknown arg 'huge'; known: big"),
        (["exp.py", "--set", "stepz=3"], "stepz: no such field in Experiment, did you mean 'steps'?"),
        (["exp.py", "--set", "steps=x"], "steps: got 'x' (str), expected int"),
        (["exp.py", "--set", "steps=13"], "steps must not be 13"),
        (["exp.py", "--set", "main.fial=x"], "did you mean 'fail'?"),
        (["typo.py"], "steps: got '3' (str), expected int"),
        (["local.py"], "main: a1jax_experiment"),
        (["lambda.py"], "cannot be imported by name"),
        (["bare.py"], "needs a field 'main'"),
        (["broken.py"], "broken.py:1: syntax error"),
        (["exp.py", "--workdir", "exp.py"], "exp.py: not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(here, capsys, argv, part):
    (here / "typo.py").write_text(EXPERIMENT.replace("100 if arg else 3", "'3'"))
    (here / "local.py").write_text(EXPERIMENT + "\ndef work(cfg, workdir):\n    pass\n")
    (here / "lambda.py").write_text(EXPERIMENT.replace("bind(work)", "bind(lambda cfg, workdir: None)"))
    (here / "bare.py").write_text(
        "from a1jax.types import Record\ndef get_config(arg=''):\n    import dataclasses\n    return Named()\n"
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Named:\n    name: str = 'x'\n"
    )
    (here / "broken.py").write_text("def (:\n")
    before = _files(here)
    assert part in _refused(capsys, "run", *argv)
    assert _files(here) == before and not (here / "runs").exists()


def test_a_mistake_found_before_anything_was_written_leaves_the_folder_free(here, capsys):
    assert "no such data" in _refused(capsys, "run", "exp.py", "--workdir", "a", "--set", "main.fail=early")
    assert not pathlib.Path("a").exists()
    assert main.main(["run", "exp.py", "--workdir", "a"]) == 0  # the corrected command
    (pathlib.Path("a") / "config.py").rename("kept.py")
    _refused(capsys, "run", "exp.py", "--workdir", "a", "--set", "main.fail=early")
    assert (pathlib.Path("a") / "out.txt").exists()  # work of others is never removed


def test_errors_of_the_run_itself(here, capsys):
    assert "found late: no data" in _refused(capsys, "run", "exp.py", "--workdir", "a", "--set", "main.fail=config")
    assert provenance.read("a")["outcome"].startswith("failed: ConfigError")
    with pytest.raises(ValueError, match="boom"):  # a bug, not a mistake of the user's, keeps its traceback
        main.main(["run", "exp.py", "--workdir", "b", "--set", "main.fail=boom"])
    assert provenance.read("b")["outcome"] == "failed: ValueError: boom"
    assert main.main(["run", "exp.py", "--workdir", "c", "--set", "main.fail=interrupt"]) == 130
    assert capsys.readouterr().err.count("\n") == 1 and provenance.read("c")["outcome"] == "interrupted"


def _command(*argv):
    return [sys.executable, "-m", "a1jax.main", *argv]


def test_exit_codes_of_the_real_command(here):
    done = subprocess.run(_command("run", "exp.py", "--set", "steps=4"), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run(_command("run", "exp.py", "--set", "steps=5"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("a1jax: runs/tiny: holds") and done.stderr.count("\n") == 1
    done = subprocess.run(_command("run"), capture_output=True, text=True)
    assert done.returncode == 2 and "FILE" in done.stderr
    assert (here / "runs/tiny/out.txt").read_text() == "4 0.5\n"


def test_control_c_is_one_line(here):
    # A shell's background jobs ignore the signal, and so would a child of tests that run as one.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import a1jax.main; sys.exit(a1jax.main.main())"
    command = [sys.executable, "-c", code, "run", "exp.py", "--workdir", "w", "--set", "main.fail=wait"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(300):
        if (here / "w/out.txt").exists():
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130 and err.startswith("a1jax: interrupted") and err.count("\n") == 1


def test_help_and_version_do_not_wait_for_jax(here):
    code = """
import sys, a1jax.main
try:
    a1jax.main.main(sys.argv[1:])
finally:
    print([name for name in ("jax", "numpy") if name in sys.modules])
"""
    for argv, part in ((["--help"], "run"), (["run", "--help"], "path=value"), (["prepare", "--help"], "--strict"), (["--version"], "0.")):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 0 and part in done.stdout and done.stdout.endswith("[]\n")
        assert time.perf_counter() - began < 5  # 0.1 s on an idle core


def test_prepare_passes_its_arguments_on_and_reports_bad_data_in_one_line(here, capsys):
    line = _refused(capsys, "prepare", "nowhere.jsonl", "--out", "out", "--tokenizer", "nowhere.model")
    assert "nowhere" in line and not (here / "out").exists()
