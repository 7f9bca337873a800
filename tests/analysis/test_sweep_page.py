import csv
import gzip
import json

import pytest

from a1jax.analysis import sweep, sweep_page
from a1jax.config import ConfigError
from a1jax.main import main
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import Grid

SMALL = Grid(sizes={"s": (30_000, 16_384), "m": (100_000, 32_768)}, horizons=(32, 128), seeds=(0, 1), of_each=2)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_knows_a_sweep_and_writes_what_there_is_of_an_unfinished_one(tmp_path, capsys, read_page):
    folder = synthetic_sweep.write(tmp_path / "<b>s", None, SMALL, missing=["m-128-1-tokens"], failed=["s-32-0-tokens"])
    assert main(["report", str(folder)]) == 0 and capsys.readouterr().out == f"{folder}/report.html\n"
    found = read_page((folder / "report.html").read_text())
    assert "6 of 8 cells finished, 1 failed, 1 not run yet" in found.text and "ValueError: loss is not finite at step 3" in found.text
    assert "size (s, m)" in found.text and "b" not in found.tags and not list(folder.rglob("*.part"))
    named = [a for a in found.addresses if a.endswith(".csv")]
    assert len(named) == found.tags.count("img") + 3 and all((folder / a).is_file() for a in named)
    rows = read_csv(folder / "report/cells.csv")
    assert [r["state"] for r in rows] == ["failed", *["finished"] * 6, "not run yet"] and rows[0]["error"].startswith("ValueError")
    cell = json.loads((folder / "cells/m-32-1-tokens/cell.json").read_text())
    row = next(r for r in rows if r["cell"] == "m-32-1-tokens")
    assert (
        int(row["wins"]) == sum(t["success"] for t in cell["tasks"]) and row["n"] == "12" and float(row["flops"]) == cell["train"]["flops"]
    )
    points = read_csv(folder / "report/points.csv")
    assert [(r["size"], r["horizon"], r["n"], r["seeds"]) for r in points] == [
        ("s", "32", "12", "1"), ("s", "128", "24", "2"), ("m", "32", "24", "2"), ("m", "128", "12", "1"),
    ]  # fmt: skip


def test_a_sweep_over_other_axes_has_bars(tmp_path, read_page):
    folder = synthetic_sweep.write(tmp_path / "s", None, SMALL)
    for path in (folder / "sweep.json", *folder.glob("cells/*/cell.json")):
        path.write_text(path.read_text().replace('"horizon"', '"k"'))
    found = read_page(sweep_page.write(folder).read_text())
    assert {"report/success_by_setting.csv", "report/success_by_length.csv", "report/training_train_loss.csv"} <= set(found.addresses)
    assert "law" not in found.text


def test_a_sweep_of_ablations_says_what_each_value_gives(tmp_path, read_page):
    folder = synthetic_sweep.write(tmp_path / "s", None, SMALL)
    for path in (folder / "sweep.json", *folder.glob("cells/*/cell.json")):
        found = json.loads(path.read_text())
        axes = found["axes"]
        found["axes"] = {"ablation": axes["size"], "value": axes["horizon"], "seed": axes["seed"]}
        if path.name == "sweep.json":
            found["axes"]["value"] = ["32", "128"]
        else:
            found["axes"]["value"] = str(axes["horizon"])
            found["against"] = {"value": "128", "unchanged": axes["size"] == "m"}
        path.write_text(json.dumps(found))
    page = read_page(sweep_page.write(folder).read_text())
    rows = read_csv(folder / "report/differences.csv")
    assert [(r["ablation"], r["value"], r["against"], r["domain"]) for r in rows[:1]] == [("s", "32", "128", "all domains")]
    assert len(rows) == 2 * 3 and {r["seeds"] for r in rows} == {"2"}
    assert (
        f"s: 32 against 128 (the first value, as none leaves the experiment as it is): {100 * float(rows[0]['difference']):.1f}"
        in page.text
    )
    assert "m: 32 against 128: " in page.text and "t interval over the seeds' differences" in page.text
    assert {"report/differences.csv", "report/difference_by_ablation.csv"} <= set(page.addresses) and "law" not in page.text
    again = sweep.load(folder / "report/sweep.jsonl.gz")  # what is packed keeps what each is compared with
    assert again.cells[0].against["value"] == "128"


def test_a_sweep_in_one_file_has_its_page_beside_it(tmp_path, capsys, read_page):
    folder = synthetic_sweep.write(tmp_path / "s", None, SMALL, missing=["m-128-1-tokens"])
    file = sweep.pack(folder, tmp_path / "kept.jsonl.gz")
    before = set(tmp_path.iterdir())
    assert main(["report", str(file)]) == 0 and capsys.readouterr().out == f"{tmp_path}/kept.report.html\n"
    assert set(tmp_path.iterdir()) - before == {tmp_path / "kept.report.html", tmp_path / "kept.report"}
    found = read_page((tmp_path / "kept.report.html").read_text())
    assert "7 of 8 cells finished, 1 not run yet" in found.text and "What it says" in found.text
    assert "Cells come from 1 commit (7 of 0000000) and 1 machine (7 of made up)." in found.text
    named = [a for a in found.addresses if a.endswith(".csv")]
    assert len(named) == found.tags.count("img") + 3 and all((tmp_path / a).is_file() for a in named)
    assert [r["state"] for r in read_csv(tmp_path / "kept.report/cells.csv")] == [*["finished"] * 7, "not run yet"]


def test_a_file_that_is_no_sweep_gives_one_line(tmp_path, capsys):
    file = tmp_path / "runs.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"task_id": "a"}\n'))
    assert main(["report", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs.jsonl.gz: its first line is no plan" in error and list(tmp_path.iterdir()) == [file]


def test_cells_of_several_commits_of_which_some_say_their_targets(tmp_path, read_page):
    """The means of a point are of all its cells or there are none."""
    folder = synthetic_sweep.write(tmp_path / "s", None, SMALL)
    for path in folder.glob("cells/m-*/cell.json"):
        cell = json.loads(path.read_text())
        cell["train"]["supervised"] = 1000 if "-32-" in path.parent.name else 2000
        cell["commit"] = "1111111222"
        if path.parent.name != "m-128-1-tokens":
            path.write_text(json.dumps(cell))
    found = read_page(sweep_page.write(folder).read_text())
    assert found.text.count("Cells come from 2 commits (5 of 0000000; 3 of 1111111).") == 2  # said, and where numbers come from
    points = read_csv(folder / "report/points.csv")
    assert [(r["size"], r["horizon"], r["supervised"]) for r in points] == [
        ("s", "32", ""), ("s", "128", ""), ("m", "32", "1000.0"), ("m", "128", ""),
    ]  # fmt: skip
    assert {r["cell"]: r["supervised"] for r in read_csv(folder / "report/cells.csv")}["m-128-0-tokens"] == "2000"
    assert "5 of 8 cells do not say how many of their tokens were targets" in found.text


def test_without_a_finished_cell_there_is_one_line_of_error(tmp_path, capsys):
    folder = synthetic_sweep.write(
        tmp_path / "s", None, Grid(sizes={"s": (2, 1)}, horizons=(32,), seeds=(0, 1)), 0, ["s-32-0-tokens"], ["s-32-1-tokens"]
    )
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none of the sweep's 2 cells is finished" in error and "s-32-1-tokens failed: ValueError" in error
    assert not (folder / "report.html").exists()
    (folder / "sweep.json").write_text("{}")
    assert main(["report", str(folder)]) == 2 and "sweep.json" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"sweep\.json"):
        sweep_page.write(tmp_path)
