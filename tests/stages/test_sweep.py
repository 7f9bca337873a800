"""Sweeps: every cell once, whoever runs it; failures are kept and tried again; a stop is no failure."""

import json
import os

import pytest

from a1jax import interruption, main
from a1jax.config import ConfigError, bind, override, save
from a1jax.stages import sweep
from a1jax.stages.sweep import Planned, Sweep


def noted(config, axes, workdir):
    """A cell that counts how often it was run, keeps a stage, and raises what it is told to."""
    count = workdir / "count"
    count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
    (workdir / "stages" / "sft").mkdir(parents=True, exist_ok=True)
    if config == "fails":
        raise ArithmeticError(f"no result\nfor {axes['number']}")
    if config == "fails once" and count.read_text() == "1":
        raise ValueError("once")
    if config == "stopped" and count.read_text() == "1":
        raise interruption.Interrupted(15, "at step 3")
    return {"tasks": [axes["number"]], "train": {"process": os.getpid()}}


def plan(number=7, kinds=(), letters=("b", "a")):
    kinds = dict(kinds)
    return [
        Planned(f"cell-{letters[i % len(letters)]}-{i}", {"letter": letters[i % len(letters)], "number": 10 - i}, kinds.get(i), noted)
        for i in range(number)
    ]


def sweep_of(**changes):
    return Sweep("test", bind(sweep.run), bind(plan, **changes))


def read(folder, name, file="cell.json"):
    return json.loads((folder / "cells" / name / file).read_text())


def test_every_cell_leaves_its_file_in_the_format(tmp_path):
    found = sweep.run(sweep_of(), tmp_path)
    names = [cell.name for cell in plan()]
    assert found == {"finished": names, "failed": []}
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "format": "a1jax.sweep/1",
        "name": "test",
        "axes": {"letter": ["b", "a"], "number": [4, 5, 6, 7, 8, 9, 10]},
        "cells": names,
    }
    cell = read(tmp_path, "cell-a-1")
    assert (cell["format"], cell["name"], cell["axes"]) == ("a1jax.cell/1", "cell-a-1", {"letter": "a", "number": 9})
    assert cell["tasks"] == [9] and {"machine", "commit"} <= set(cell)
    assert not (tmp_path / "cells" / "cell-a-1" / "stages").exists()


@pytest.mark.parametrize("n", [2, 3, 9])
def test_shards_share_the_cells_without_rest_or_overlap(tmp_path, n, capsys):
    for i in range(n):
        before = sum(1 for _ in tmp_path.glob("cells/*/cell.json"))
        sweep.run(override(sweep_of(), [f"shard={i}/{n}"]), tmp_path)
        assert sum(1 for _ in tmp_path.glob("cells/*/cell.json")) - before == len(plan()[i::n])
    assert {file.read_text() for file in tmp_path.glob("cells/*/count")} == {"1"}
    sweep.run(sweep_of(), tmp_path)  # another number of shards later on: all is finished
    assert {file.read_text() for file in tmp_path.glob("cells/*/count")} == {"1"}
    assert "0 of 7 cells to run" in capsys.readouterr().out


def test_a_cell_that_somebody_is_at_is_left_to_them(tmp_path):
    with sweep.claim(tmp_path, plan()[2]) as free:
        assert free
        assert "cell-b-2" not in sweep.run(sweep_of(), tmp_path)["finished"]
    assert len(sweep.run(sweep_of(), tmp_path)["finished"]) == 7  # let go of: the next start runs it
    with sweep.claim(tmp_path, plan()[2]) as free:
        assert not free  # finished
    assert {file.read_text() for file in tmp_path.glob("cells/*/count")} == {"1"}


def test_the_time_that_is_left_counts_what_others_have_finished(tmp_path):
    cells = plan(4)
    assert sweep._time_left(tmp_path, cells, 90.0, 0.0) == "nothing finished yet"
    for cell in cells[:3]:
        (tmp_path / "cells" / cell.name).mkdir(parents=True)
        (tmp_path / "cells" / cell.name / "cell.json").write_text("{}")
    assert sweep._time_left(tmp_path, cells, 540.0, 0.0) == "about 3 min left"
    (tmp_path / "cells" / cells[3].name).mkdir()
    (tmp_path / "cells" / cells[3].name / "failed.json").write_text("{}")
    assert sweep._time_left(tmp_path, cells, 540.0, 0.0) == "about 0 min left"


def test_a_cell_that_would_wait_for_another_process_is_put_off(tmp_path):
    order = []

    def run(config, axes, workdir):
        order.append(workdir.name)
        return {}

    busy = {"a": lambda config, workdir: "c" not in order, "b": lambda config, workdir: config == "for ever"}
    cells = [Planned(name, {}, "for ever", run, busy=busy.get(name)) for name in "abcd"]
    assert sweep.run(Sweep("test", bind(sweep.run), bind(lambda: cells)), tmp_path)["finished"] == list("abcd")
    assert order == ["c", "a", "d", "b"]  # a as soon as it need not wait; b in the end, where it waits by itself


def test_only_cells_of_those_names_are_run(tmp_path):
    found = sweep.run(override(sweep_of(), ['only=("cell-a-*", "*-4")']), tmp_path)["finished"]
    assert found == ["cell-a-1", "cell-a-3", "cell-b-4", "cell-a-5"]
    with pytest.raises(ConfigError, match="no cell has a name like z; the first one is cell-b-0"):
        sweep.run(override(sweep_of(), ['only=("z",)']), tmp_path)
    assert len(sweep.run(sweep_of(), tmp_path)["finished"]) == 7


def test_a_failure_is_written_down_and_tried_again(tmp_path, capsys):
    cfg = sweep_of(kinds=((1, "fails"), (2, "fails once")))
    assert sweep.run(cfg, tmp_path)["failed"] == ["cell-a-1", "cell-b-2"]
    failed = read(tmp_path, "cell-a-1", "failed.json")
    assert failed["error"] == "ArithmeticError: no result for 9" and failed["axes"]["number"] == 9 and "noted" in failed["traceback"]
    assert sum(1 for _ in tmp_path.glob("cells/*/cell.json")) == 5
    assert sweep.run(cfg, tmp_path)["failed"] == ["cell-a-1"]
    assert not (tmp_path / "cells/cell-b-2/failed.json").exists() and read(tmp_path, "cell-b-2")["tasks"] == [8]
    assert (tmp_path / "cells/cell-b-0/count").read_text() == "1"
    assert "failed: cell-a-1: ArithmeticError" in capsys.readouterr().out


def test_a_cell_that_failed_elsewhere_in_the_meantime_is_not_tried_again_by_this_start(tmp_path, monkeypatch):
    cfg, runs = sweep_of(kinds=((2, "fails"),)), sweep.run_cell

    def with_another_start(cell, *rest):
        if cell.name == "cell-b-0":  # while this one is at its first cell, another start comes to the one that fails
            sweep.run(override(cfg, ['only=("cell-b-2",)']), tmp_path)
        return runs(cell, *rest)

    monkeypatch.setattr(sweep, "run_cell", with_another_start)
    sweep.run(cfg, tmp_path)
    assert read(tmp_path, "cell-b-2", "count") == 1


def test_a_stop_is_no_failure_and_the_cell_goes_on(tmp_path):
    cfg = sweep_of(kinds=((3, "stopped"),))
    with pytest.raises(interruption.Interrupted):
        sweep.run(cfg, tmp_path)
    assert sum(1 for _ in tmp_path.glob("cells/*/cell.json")) == 3 and not list(tmp_path.glob("cells/*/failed.json"))
    assert (tmp_path / "cells/cell-a-3/stages").exists()  # what it goes on from
    assert len(sweep.run(cfg, tmp_path)["finished"]) == 7


def test_a_folder_of_other_cells_and_bad_plans_are_refused(tmp_path):
    sweep.run(sweep_of(number=2), tmp_path)
    with pytest.raises(ConfigError, match="other cells"):
        sweep.run(sweep_of(number=3), tmp_path)
    with pytest.raises(ConfigError, match="no cells"):
        sweep.run(sweep_of(number=0), tmp_path / "none")
    with pytest.raises(ConfigError, match="several cells named"):
        sweep.write_plan("test", [*plan(2), *plan(1)], tmp_path / "twice")
    for text in ("2/2", "1", "a/b", "-1/2", "1/"):
        with pytest.raises(ConfigError, match="shard"):
            override(sweep_of(), [f"shard={text}"])


def test_another_shard_is_the_same_run_but_another_sweep_is_not(tmp_path):
    cfg = Sweep("test", bind(sweep.run), bind(sweep.axes_of))  # a function that a file can name
    save(override(cfg, ["shard=0/2"]), tmp_path / "config.py")
    main._refuse_another_run(override(cfg, ["shard=1/2", 'only=("a*",)']), tmp_path)
    with pytest.raises(ConfigError, match="keep_stages"):
        main._refuse_another_run(override(cfg, ["keep_stages=True"]), tmp_path)
