"""Reading a sweep's folder: what is there, what failed, what is missing, and the errors that a wrong folder gives."""

import dataclasses
import gzip
import json

import pytest

from a1jax.analysis import sweep
from a1jax.config import ConfigError
from tests.analysis import synthetic_sweep
from tests.analysis.synthetic_sweep import Grid, Law

SMALL = Grid(horizons=(32, 64), seeds=(0, 1), of_each=2)


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    folder = synthetic_sweep.write(tmp_path / "s", grid=SMALL, missing=["xs-32-0-tokens"], failed=["l-64-1-tokens"])
    found = sweep.load(folder)
    whole = synthetic_sweep.read(Law(), SMALL)
    assert found.name == "s" and found.axes == SMALL.axes and found.missing == ("xs-32-0-tokens",)
    assert [(f.name, f.axes["size"], f.error) for f in found.failed] == [("l-64-1-tokens", "l", "ValueError: loss is not finite at step 3")]
    assert found.cells == tuple(c for c in whole.cells if c.name not in ("xs-32-0-tokens", "l-64-1-tokens"))
    assert len(found.cells) == 4 * 2 * 2 - 2 and found.cells[0].parameters == {"total": 12_000, "active": 8_192}


def test_a_sweep_in_one_file_is_the_same_sweep(tmp_path):
    folder = synthetic_sweep.write(tmp_path / "s", grid=SMALL, missing=["xs-32-0-tokens"], failed=["l-64-1-tokens"])
    found, packed = sweep.load(folder), sweep.load(sweep.pack(folder, tmp_path / "s.jsonl.gz"))
    assert (packed.name, packed.axes) == (found.name, found.axes)
    assert packed.cells == tuple(dataclasses.replace(cell, curves={}) for cell in found.cells)
    assert packed.missing == ("xs-32-0-tokens", "l-64-1-tokens")  # what failed is not finished
    assert sweep.pack(folder, tmp_path / "again.jsonl.gz").read_bytes() == (tmp_path / "s.jsonl.gz").read_bytes()


def test_a_file_that_is_no_sweep_is_refused_in_one_line(tmp_path):
    for name, content in (("text", b"hello"), ("cut", gzip.compress(b"{}" * 99)[:20]), ("other", gzip.compress(b'{"format": "x"}\n'))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: .*give what pack wrote, or a folder") as caught:
            sweep.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_cell_that_succeeded_after_it_failed_has_succeeded(tmp_path):
    folder = synthetic_sweep.write(tmp_path, grid=SMALL)
    (folder / "cells" / "s-32-0-tokens" / "failed.json").write_text("{}")
    assert sweep.load(folder).failed == () and len(sweep.load(folder).cells) == 16


def test_a_cell_that_the_sweep_does_not_name_is_said_and_left_out(tmp_path):
    folder = synthetic_sweep.write(tmp_path, grid=SMALL)
    synthetic_sweep.write(tmp_path / "other", grid=dataclasses.replace(SMALL, horizons=(32, 64, 128)))
    (tmp_path / "other" / "cells" / "m-128-0-tokens").rename(folder / "cells" / "m-128-0-tokens")
    found = sweep.load(folder)
    assert found.unlisted == ("m-128-0-tokens",) and len(found.cells) == 16


def broken(folder, **fields):
    path = folder / "cells" / "s-32-0-tokens" / "cell.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "sweep.json").unlink(), "no sweep.json in it; give the folder of a sweep"),
        (lambda f: (f / "sweep.json").write_text('{"format": "a1jax.sweep/9"}'), "expected 'a1jax.sweep/1'"),
        (lambda f: (f / "sweep.json").write_text('{"format": "a1jax.sweep/1", "name": "x"}'), "no 'axes' in it"),
        (lambda f: (f / "cells/s-32-0-tokens/cell.json").write_text("{"), "cell.json: cannot be read"),
        (lambda f: (f / "cells/s-32-0-tokens/cell.json").write_text("[]"), "holds a list, not an object"),
        (lambda f: broken(f, format="a1jax.cell/2"), "format 'a1jax.cell/2', expected 'a1jax.cell/1'"),
        (lambda f: broken(f, name="m-32-0-tokens"), "it calls itself 'm-32-0-tokens'"),
        (lambda f: broken(f, tasks=None), "tasks: got None"),
        (lambda f: broken(f, tasks=[3]), "tasks.0: got 3, expected an object"),
        (lambda f: broken(f, parameters={"total": 3}), "parameters.active is None"),
        (lambda f: broken(f, tasks=[{"domain": "search", "steps": 1, "task_id": "a", "success": 2}]), "tasks.0.success is 2; it is 0 or 1"),
        (lambda f: broken(f, tasks=[{"domain": "search", "steps": 1, "success": 1}]), "tasks.0: no 'task_id' in it"),
    ],
)
def test_what_is_no_sweep_gives_one_clear_line(tmp_path, spoil, says):
    folder = synthetic_sweep.write(tmp_path, grid=SMALL)
    spoil(folder)
    with pytest.raises(ConfigError) as error:
        sweep.load(folder)
    assert says in str(error.value) and str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_cells_are_chosen_by_their_axes():
    cells = synthetic_sweep.read(Law(), dataclasses.replace(SMALL, budgets=("tokens", "flops"))).cells
    assert {c.name for c in sweep.where(cells, budget="flops", size=("s", "m"), seed=1)} == {
        f"{size}-{h}-1-flops" for size in ("s", "m") for h in (32, 64)
    }
    assert sweep.where(cells, size="xxl") == ()
    with pytest.raises(ConfigError, match="no cell has an axis 'horizn', did you mean 'horizon'"):
        sweep.where(cells, horizn=32)


def test_where_cells_come_from():
    cells = synthetic_sweep.read(Law(), SMALL).cells
    assert sweep.origins(cells) == "" and sweep.origins(()) == ""
    assert sweep.origins(cells, 1) == "Cells come from 1 commit (16 of 0000000) and 1 machine (16 of made up)."
    mixed = [dataclasses.replace(c, machine="2 cores, x" if i % 4 else "", commit="abcdefgh" * (i > 0)) for i, c in enumerate(cells)]
    both = "Cells come from 2 commits (15 of abcdefg; 1 of unknown) and 2 machines (12 of 2 cores, x; 4 of unknown)."
    assert sweep.origins(mixed) == both
    assert sweep.origins([dataclasses.replace(c, commit="") for c in mixed]).startswith("Cells come from 2 machines (12")


def cell(size, horizon, wins):
    tasks = [
        {"domain": "search", "steps": s, "task_id": f"{s}-{i}", "success": w} for s, several in wins.items() for i, w in enumerate(several)
    ]
    axes = {"size": size, "horizon": horizon, "seed": 0}
    return sweep.Cell(f"{size}-{horizon}", axes, {"total": 1, "active": 1}, {}, tuple(tasks))


def test_rates_are_pooled_and_have_wilson_intervals():
    cells = [cell("s", 32, {1: [1, 1, 0, 1], 2: [0, 0]}), cell("s", 64, {1: [1]})]
    by_size = sweep.rates(cells, ["size"])
    assert [(r["size"], r["wins"], r["n"]) for r in by_size] == [("s", 4, 7)]
    rows = sweep.rates(cells, ["horizon", "steps"])
    assert [(r["horizon"], r["steps"], r["wins"], r["n"], r["success"]) for r in rows] == [
        (32, 1, 3, 4, 0.75), (32, 2, 0, 2, 0.0), (64, 1, 1, 1, 1.0),
    ]  # fmt: skip
    # Wilson by hand for 3 of 4, z = 1.96: (0.75 + z2/8 -+ z sqrt(0.1875/4 + z2/64)) / (1 + z2/4), z2 = 3.8416
    assert rows[0]["low"] == pytest.approx(0.3006, abs=1e-4) and rows[0]["high"] == pytest.approx(0.9544, abs=1e-4)
    assert sweep.rates([cells[1]], ["size", "arm"])[0]["arm"] is None
    assert sweep.rate(0, 0)["low"] == 0.0 and sweep.rate(0, 0)["success"] != sweep.rate(0, 0)["success"]
