"""A cell of horizon against parameters: its rows, its budget, and one cell from end to end."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from a1jax import config, metrics
from a1jax.config import ConfigError, bind
from a1jax.domains import solve
from a1jax.domains.search import Search
from a1jax.models import config as models
from a1jax.models import flops
from a1jax.rollout.agent import Limits
from a1jax.stages import experts, horizon_cell, horizon_grid, sft, sweep
from a1jax.stages.horizon_cell import HorizonCell
from a1jax.stages.pipeline import TokenizerConfig
from a1jax.stages.setting import Setting
from a1jax.stages.sft import Phase, SftConfig
from a1jax.types import TrainState

GRID = pathlib.Path(__file__).parents[2] / "experiments/ablations/horizon_vs_params.py"
BASE = HorizonCell(
    model=models.nano(16),
    horizon=80,
    families={"search": Search(pages=64, numbers=16)},
    runs={1: 60, 2: 60, 5: 30, 9: 20},
    sft=SftConfig(loss_tile=256, phases=(Phase(0.5, 2), Phase(0.5, 9)), save_every=2),
    tokens=60_000,
    heldout={1: 3, 12: 2},
    limits=Limits(slots=5, max_turns=4, max_turn_tokens=16, max_length=256, temperature=0.0),
    tokenizer=TokenizerConfig(vocab_size=608, counters=16),
    reference=models.nano(32),
    reference_horizon=80,
    slots=1024,
    row_lengths=(128, 256),
)


def prepared(cell):
    """(the SFT stage, its data, materials, setting) as ``run`` makes them."""
    tokenizer = horizon_cell.open_tokenizer(tuple(cell.families.values()), cell.tokenizer)
    cut = horizon_cell.cut_runs(cell, tokenizer)
    materials = [horizon_cell.material(cell, cut, p) for p in horizon_cell.phases_of(cell)]
    stage = dataclasses.replace(cell.sft, steps=horizon_cell.steps_of(cell, tokenizer, materials), **horizon_cell.shape(cell))
    setting = Setting(cell.model, tokenizer, ("search",), None, None, None, cell.seed)
    return stage, [(steps, piece.example) for steps, piece in cut], materials, setting


@pytest.mark.parametrize("horizon", [34, 80, 250])
@pytest.mark.parametrize("arm", ["consults", "solvable"])
def test_no_segment_of_a_training_row_is_longer_than_the_horizon(horizon, arm):
    cell = dataclasses.replace(BASE, horizon=horizon, arm=arm)
    if arm == "solvable" and horizon == 34:
        with pytest.raises(ConfigError, match="no run of up to 2 steps"):
            prepared(cell)
        return
    stage, data, _, setting = prepared(cell)
    source, longest, seen = sft.Curriculum(stage, data, setting), 0, set()
    for step in range(0, stage.steps):
        batch, _ = source.next(TrainState(np.int32(step), None, None, None))
        for row in batch.segment_ids:
            longest = max(longest, np.bincount(row)[1:].max())
        seen |= set(np.unique(batch.tokens).tolist())
    assert horizon // 2 < longest <= horizon
    numbers = {setting.tokenizer.encode(f" {i}")[-1] for i in range(1, 17)}
    assert len(numbers) == 16 and numbers <= seen  # no counter is unknown to any cell


def test_no_token_of_the_held_out_runs_is_unknown_to_the_cells_of_the_grid_that_see_least():
    planned = {cell.name: cell.config for cell in config.load(str(GRID)).cells()}
    for name in ("nano_128-h34-consults-flops-s0", "nano_128-h1024-consults-flops-s0", "nano_80-h80-solvable-tokens-s0"):
        cell = planned[name]
        stage, data, _, setting = prepared(cell)
        source = sft.Curriculum(stage, data, setting)
        steps = range(min(stage.steps, 250))
        seen = {t for s in steps for t in np.unique(source.next(TrainState(np.int32(s), None, None, None))[0].tokens).tolist()}
        tasks = experts.tasks(cell.families["search"], cell.heldout, "heldout", 0)
        judged = {int(t) for task in tasks for t in experts.example(solve(task), 0, setting.tokenizer, False).tokens}
        assert len(judged) > 100 and judged <= seen, name


def test_budgets_of_tokens_and_of_flops_are_met_and_differ():
    tokens, costs = {}, {}
    for horizon in (34, 80, 250):
        for width in (16, 32):
            for budget in ("tokens", "flops"):
                cell = dataclasses.replace(BASE, horizon=horizon, model=models.nano(width), budget=budget)
                stage, data, materials, setting = prepared(cell)
                used = horizon_cell.spent(stage, data, setting)
                tokens[width, horizon, budget] = sum(used)
                costs[width, horizon, budget] = sum(n * m.flops(cell.model) for n, m in zip(used, materials, strict=True))
    equal = [n for (_, _, budget), n in tokens.items() if budget == "tokens"]
    assert np.allclose(equal, BASE.tokens, rtol=0.02)
    wanted = costs[32, 80, "tokens"]
    assert np.allclose([n for (_, _, budget), n in costs.items() if budget == "flops"], wanted, rtol=0.02)
    assert tokens[16, 80, "flops"] > 2 * tokens[32, 80, "flops"]


def test_flops_of_a_material_by_the_formula():
    cell = dataclasses.replace(BASE, horizon=250)
    _, _, (first, last), _ = prepared(cell)
    assert 52 <= first.length <= 76 < last.length < 28 + 24 * 9  # tokens of runs of 1, 2 and 9 steps
    assert first.flops(cell.model) == flops.training(cell.model, round(first.length), first.supervised, 2 * first.supervised).model
    assert 0.5 < last.supervised < 0.56  # 12 + 4 + 12 n of 28 + 24 n


def test_the_members_grow_thirty_times_and_the_grid_is_whole():
    active = [horizon_cell.transformer.parameter_counts(models.nano(w))[1] for w in models.NANO_WIDTHS]
    assert len(active) >= 5 and active[-1] / active[0] > 30
    sizes, horizons = ("nano_16", "nano_32", "nano_48"), (34, 80, 250)
    cells = horizon_grid.cells(BASE, sizes, horizons, (0, 1), solvable=(80,))
    assert len({c.name for c in cells}) == len(cells) == 2 * 3 * (2 * 3 + 1)
    assert all(c.config.reference == models.nano(32) and c.config.reference_horizon == 80 for c in cells)
    for c in cells:
        assert c.config.model == models.NAMED[c.axes["size"]](vocab_size=608)
        assert all(getattr(c.config, axis) == c.axes[axis] for axis in ("horizon", "arm", "budget", "seed"))
    with pytest.raises(ConfigError, match="row_lengths"):
        dataclasses.replace(BASE, horizon=300)


def test_a_cell_from_end_to_end_and_gone_on_with(tmp_path, monkeypatch):
    cell = dataclasses.replace(BASE, tokens=6_000)
    planned = horizon_grid.cells(cell, ("nano_16",), (80,), (0,), budgets=("tokens",))
    cfg = sweep.Sweep("test", bind(sweep.run), bind(list))
    config.check(planned[0].config)
    judge = horizon_cell.judge
    monkeypatch.setattr(horizon_cell, "judge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep.run_cell(planned[0], tmp_path, {"machine": "here", "commit": None})
    assert not list(tmp_path.glob("cells/*/cell.json"))
    monkeypatch.setattr(horizon_cell, "judge", judge)
    monkeypatch.setattr(horizon_cell.sft.train, "fit", None)  # the trained parameters are read back
    assert sweep.run_cell(planned[0], tmp_path, {"machine": "here", "commit": None}).startswith("success 0.0 %")
    found = json.loads((tmp_path / "cells" / planned[0].name / "cell.json").read_text())
    assert found["axes"] == {"size": "nano_16", "horizon": 80, "seed": 0, "budget": "tokens", "arm": "consults"}
    assert found["parameters"]["active"] == 17_548 and found["parameters"]["active_without_embedding"] == 7_820
    train = found["train"]
    assert 76 <= train["longest_piece"] <= 80 and train["tokens"] == pytest.approx(6_000, rel=0.1) and 0 < train["feedback"] < 1
    assert [(t["steps"], t["domain"]) for t in found["tasks"]] == [(1, "search")] * 3 + [(12, "search")] * 2
    wanted = [t.task_id for t in experts.tasks(cell.families["search"], cell.heldout, "heldout", 0)]
    assert [t["task_id"] for t in found["tasks"]] == wanted
    assert found["curves"]["ce/loss"] and metrics.read(tmp_path / "cells" / planned[0].name)
    assert cfg.shard == "0/1"
