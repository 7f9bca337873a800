"""The notebooks: clean as they lie there, without logic, and all five run top to bottom from a fresh folder.

Running them takes a minute or two of CPU; what they make is made smaller than what a reader gets, see SMALLER."""

import ast
import importlib
import os
import pathlib
import subprocess
import sys

import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ("01_quickstart", "02_horizon_vs_params", "03_vocabulary_alignment", "04_moe_routing", "05_pod_planning")
LOGIC = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.If,
    ast.IfExp,
    ast.For,
    ast.While,
    ast.Try,
    ast.With,
    ast.comprehension,
)
SMALLER = {  # set after a notebook's parameters; of 01 the programs stay those that tests/stages/test_pipeline.py has compiled
    "01_quickstart": 'CHANGES = "sft.steps=4", "distill.steps=2", "limits.max_turns=2", '
    '"evaluation.counts={1: 2}", "admission.counts={1: 2}"',
    "04_moe_routing": 'CHANGES, EACH = ("sft.steps=4", "sft.rows=2", "sft.max_length=256"), 4',
    "05_pod_planning": 'STAGE, SHAPES = "rollout", SHAPES[1:]',
}


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def code(path):
    return code_of(read(path))


def test_all_five_are_there_and_in_the_index():
    assert [path.stem for path in BOOKS] == list(NAMES)
    index = (ROOT / "notebooks" / "README.md").read_text()
    assert all(f"[{name}]({name}.ipynb)" in index for name in NAMES)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    book = read(path)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in code(path))
    assert set(book.metadata) == {"kernelspec", "language_info"} and book.metadata.kernelspec.name == "python3"


def wrong_in_cell(source):
    """What a cell may not have."""
    return sorted({type(node).__name__ for node in ast.walk(ast.parse(source)) if isinstance(node, LOGIC)})


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = f(a) or g(b)", []),
        ("def f():\n    return 1", ["FunctionDef"]),
        ("[f(x) for x in y]", ["comprehension"]),
        ("x = 1 if y else 2", ["IfExp"]),
        ("for x in y:\n    if x:\n        pass", ["For", "If"]),
    ],
)
def test_logic_would_be_seen(source, found):
    assert wrong_in_cell(source) == found


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_cells_hold_no_logic(path):
    assert [(cell.source, wrong) for cell in code(path) if (wrong := wrong_in_cell(cell.source))] == []


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_what_cells_import_and_call_is_there(path):
    """Every import is of a1jax.analysis, and every function called through it is one with a docstring."""
    rooms, tree = {}, ast.parse("\n".join(cell.source for cell in code(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module == "a1jax.analysis"
            rooms |= {alias.name: importlib.import_module(f"a1jax.analysis.{alias.name}") for alias in node.names}
        assert not isinstance(node, ast.Import)
    assert rooms
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls and all(isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) for f in calls)
    assert all(getattr(rooms[f.value.id], f.attr).__doc__ for f in calls)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_parameters_stand_alone_and_first(path):
    first = code(path)[0]
    assert first.metadata.tags == ["parameters"] and "None" in first.source
    assert all(isinstance(node, ast.Assign) for node in ast.parse(first.source).body)


def test_ruff_finds_nothing():
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, str(ROOT / "notebooks")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def executed(name, folder, changed, flags_for_tpu):
    """The notebook after it ran in folder/notebooks, beside this checkout's experiments; changed: put after its parameters, or ""."""
    (folder / "notebooks").mkdir()
    (folder / "experiments").symlink_to(ROOT / "experiments")
    path, book = folder / "notebooks" / f"{name}.ipynb", read(ROOT / "notebooks" / f"{name}.ipynb")
    if changed:
        book.cells.insert(book.cells.index(code_of(book)[0]) + 1, nbformat.v4.new_code_cell(changed))
    nbformat.write(book, path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if name == "05_pod_planning":
        environment["XLA_FLAGS"] = flags_for_tpu
    command = [sys.executable, str(ROOT / "tests" / "run_notebook.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return read(path)


def shown(book):
    """The HTML of every cell that ends with an expression; each has one."""
    pages = []
    for cell in code_of(book):
        results = [out.data for out in cell.outputs if out.output_type == "execute_result"]
        assert len(results) == isinstance(ast.parse(cell.source).body[-1], ast.Expr), cell.source
        pages += [data["text/html"] for data in results]
    return pages


@pytest.mark.parametrize("name", NAMES)
def test_runs_top_to_bottom(name, tmp_path, flags_for_tpu):
    if name == "05_pod_planning":
        pytest.importorskip("libtpu")
    pages = shown(executed(name, tmp_path, SMALLER.get(name, ""), flags_for_tpu))
    assert any("<table" in page for page in pages) and any("<img" in page for page in pages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changed"), [("01_quickstart", ""), ("02_horizon_vs_params", "SWEEP = None"), ("04_moe_routing", ""), ("05_pod_planning", "")]
)
def test_runs_as_a_reader_gets_it(name, changed, tmp_path, flags_for_tpu):
    """01, 04 and 05 as they lie there, and 02 making its own sweep."""
    if name == "05_pod_planning":
        pytest.importorskip("libtpu")
    assert shown(executed(name, tmp_path, changed, flags_for_tpu))
