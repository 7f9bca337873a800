"""The rules of the house: who imports whom, sizes and names of files, the README's two lines, experiments that load."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from a1jax import config

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Floors, from the ground up. A module imports from its own room and from floors below, never from above.
FLOORS = (
    {"kernels"},
    {
        *("__init__", "params", "sharding", "mesh_shapes", "distributed", "coordination", "types"),
        *("config", "config_types", "config_bind", "config_files"),
    },
    {"models", "losses", "align"},
    {
        *("train", "optim", "update_rule", "data", "domains", "rollout", "checkpoint", "metrics", "provenance"),
        *("interruption", "lost_process"),
    },
    {"stages"},
    {"main", "analysis"},
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
STRANGERS = {"models", "losses", "align"}  # rooms of one floor that do not know each other
FORBIDDEN = {"tensorflow", "torch"}
KERNELS_MAY = {"jax", "jaxtyping", "numpy"} | set(sys.stdlib_module_names)


def _sources():
    """(path, dotted module name) of every source file."""
    for path in sorted(ROOT.glob("a1jax/**/*.py")):
        yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("kernels/**/*.py")):
        yield path, "a1jax." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("experiments/**/*.py")):
        yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)


SOURCES = list(_sources())


def imports(text: str, module: str) -> set[str]:
    """Dotted names of everything that a module's text imports, also inside functions; relative ones made absolute."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def _room(name: str) -> str | None:
    """The room of a dotted name: models for a1jax.models.moe; None for what is not ours."""
    parts = name.split(".")
    if parts[0] == "experiments":
        return "experiments"
    if parts[0] != "a1jax":
        return None
    here = ROOT / "a1jax" / parts[1] if len(parts) > 1 else ROOT
    if len(parts) == 1 or not (parts[1] in FLOOR or here.is_dir() or here.with_suffix(".py").exists()):
        return "__init__"  # a name in a1jax/__init__.py
    return parts[1]


def wrong_imports(text: str, module: str) -> list[str]:
    """What a module may not import, with the reason."""
    room, wrong = _room(module), []
    for name in sorted(imports(text, module)):
        other, top = _room(name), name.split(".")[0]
        if top in FORBIDDEN and room != "experiments":
            wrong.append(f"{module} imports {name}: not a run-time dependency")
        elif top in ("tests", "experiments", "notebooks"):
            wrong.append(f"{module} imports {name}: nobody imports from there")
        elif room == "kernels" and other != "kernels" and top not in KERNELS_MAY:
            wrong.append(f"{module} imports {name}: kernels import jax only")
        elif other is not None and room != "experiments" and other != room:
            if FLOOR[other] > FLOOR[room]:
                wrong.append(f"{module} imports {name}: from a floor above")
            elif {room, other} <= STRANGERS:
                wrong.append(f"{module} imports {name}: {room} and {other} do not know each other")
    return wrong


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("a1jax.models.moe", "from a1jax.losses import masked", 1),
        ("a1jax.models.moe", "from ..losses.masked import mean", 1),
        ("a1jax.models.moe", "from .. import losses, sharding", 1),
        ("a1jax.models.moe", "from . import layers\nfrom ..params import ParamSpec\nimport jax", 0),
        ("a1jax.models.moe", "def f():\n    import a1jax.stages.sft", 1),
        ("a1jax.train", "from . import checkpoint, metrics\nfrom .models import transformer", 0),
        ("a1jax.stages.sft", "from a1jax.main import main", 1),
        ("a1jax.config", "from a1jax import __version__, types", 0),
        ("a1jax.types", "from .data import packing", 1),
        ("a1jax.kernels.op.kernel", "import jax.numpy as jnp, math\nfrom . import reference\nfrom a1jax.kernels.op import tuning", 0),
        ("a1jax.kernels.op.kernel", "from a1jax.sharding import constrain", 1),
        ("a1jax.kernels.op.kernel", "import flax", 1),
        ("a1jax.data.packing", "import torch", 1),
        ("a1jax.data.packing", "from tests.data import rows", 1),
        ("experiments.smoke", "from a1jax.stages import pipeline", 0),
        ("experiments.smoke", "import experiments.other", 1),
    ],
)
def test_the_walk_itself_sees_what_is_wrong(module, text, wrong):
    assert len(wrong_imports(text, module)) == wrong


def test_imports_go_down_the_floors():
    rooms = {_room(module) for _, module in SOURCES} - {"experiments"}
    assert rooms <= set(FLOOR), f"say on which floor they are: {sorted(rooms - set(FLOOR))}"
    assert len(SOURCES) > 20
    wrong = [line for path, module in SOURCES for line in wrong_imports(path.read_text(), module)]
    assert wrong == []


def test_no_file_is_long_and_none_is_named_for_nothing():
    files = [path for folder in ("a1jax", "kernels", "experiments", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    long = [f"{path.relative_to(ROOT)}: {n}" for path in files if (n := len(path.read_text().splitlines())) > 400]
    assert long == []
    words = re.compile(r"utils?|helpers?|managers?|factory|factories|misc|common")
    names = [str(path.relative_to(ROOT)) for path in files]
    assert [name for name in names if any(words.fullmatch(word) for word in re.split(r"[_/.]", name))] == []


def test_every_module_says_what_it_is_for():
    texts = {str(path.relative_to(ROOT)): path.read_text() for path, _ in SOURCES}
    assert [name for name, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))] == []


def test_nothing_is_left_to_do():
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert [f"{path.relative_to(ROOT)}: {m[0]}" for path, _ in SOURCES if (m := marks.search(path.read_text()))] == []


def test_the_readme_has_its_two_lines():
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert 'pip install -e ".[test]" && pytest' in lines
    runs = [line.split()[2] for line in lines if line.startswith("a1jax run experiments/")]
    assert runs
    for spec in runs:
        config.check(config.load(str(ROOT / spec)))


BENCHES = sorted(ROOT.glob("experiments/bench_*.py"))
EXPERIMENTS = sorted(set(ROOT.glob("experiments/**/*.py")) - set(BENCHES))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_is_and_loads_with_every_documented_arg(path, tmp_path):
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring and f"a1jax run {name}" in docstring
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert "get_config" in names
    args = {""} | set(re.findall(rf"{re.escape(name)}:([\w,=.+-]*\w)", docstring))
    for arg in sorted(args):
        cfg = config.load(f"{path}:{arg}")
        config.check(cfg)
        assert dataclasses.is_dataclass(cfg) and isinstance(cfg.main, config.Binding)
        config.save(cfg, tmp_path / "config.py")
        assert config.diff(config.load(str(tmp_path / "config.py")), cfg) == []
    with pytest.raises(config.ConfigError):
        config.load(f"{path}:no_such_arg")


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_a_bench_says_how_it_is_run(path):
    done = subprocess.run([sys.executable, "-m", f"experiments.{path.stem}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m experiments.{path.stem}" in ast.get_docstring(ast.parse(path.read_text()))


def test_there_are_experiments():
    assert EXPERIMENTS and BENCHES


def test_the_lists_of_tests_name_what_is_there():
    lists = re.findall(r'^(LONGEST|QUICK|NOT_QUICK) = """(.*?)"""', (ROOT / "tests/conftest.py").read_text(), re.MULTILINE | re.DOTALL)
    assert len(lists) == 3
    for name in " ".join(names for _, names in lists).split():
        file, _, test = name.partition("::")
        text = (ROOT / "tests" / file).read_text()  # FileNotFoundError: one was renamed
        assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), name
