import dataclasses

import jax
import numpy as np
import optax
import pytest

from a1jax import metrics, optim, train
from a1jax.config import ConfigError, bind
from a1jax.data import packing
from a1jax.domains import QUICKSTART
from a1jax.stages import sft
from a1jax.stages.setting import MeshConfig, Setting, make_mesh
from a1jax.stages.sft import Phase, SftConfig

CFG = SftConfig(steps=8, rows=4, max_length=160, optimizer=bind(optim.muon, learning_rate=0.02), save_every=3, log_every=1, vocab_block=256)

GOLDEN_LOSS, GOLDEN_NORM, GOLDEN_TOKENS = (6.899686, 6.677432, 6.327948), 1.24221, 333


def train_on(cfg, data, setting, stage="sft"):
    return sft.run(cfg, setting.init_params(), sft.Curriculum(cfg, data, setting), setting, stage)


@pytest.fixture(scope="module")
def whole(tokenizer, small_model, data, tmp_path_factory):
    """(setting, parameters) of one stage from its first step to its last."""
    folder = tmp_path_factory.mktemp("whole")
    with metrics.Writer(folder) as writer:
        setting = Setting(small_model, tokenizer, tuple(QUICKSTART), None, folder, writer, 0, families=QUICKSTART)
        yield setting, train_on(CFG, data, setting, "whole")


def lines_of(setting, stage):
    return [line for line in metrics.read(setting.workdir) if line["stage"] == stage]


def test_stage_learns_stores_and_is_not_run_twice(whole):
    setting, params = whole
    losses = [line["ce/loss"] for line in lines_of(setting, "whole")]
    assert len(losses) == 8 and losses[0] > 6.0 and losses[-1] < 0.9 * losses[0]
    again = sft.run(CFG, None, None, setting, "whole")  # finished: neither parameters nor data are looked at
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), params, again))
    assert setting.facts("whole")["steps"] == 8


def test_golden_first_steps(whole):
    """Numbers of seed 0, written down once: a change of model, data, loss or optimizer that should change nothing must not move them."""
    lines = lines_of(whole[0], "whole")
    np.testing.assert_allclose([line["ce/loss"] for line in lines[:3]], GOLDEN_LOSS, rtol=2e-3)
    np.testing.assert_allclose(lines[0]["grad_norm"], GOLDEN_NORM, rtol=2e-3)
    assert lines[0]["ce/tokens"] == GOLDEN_TOKENS


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(whole, data, monkeypatch):
    setting, params = whole
    taken = iter(range(5))
    original = sft.Packed.next

    def interrupted(self, state):
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return original(self, state)

    monkeypatch.setattr(sft.Packed, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_on(CFG, data, setting, "cut")
    monkeypatch.undo()
    resumed = train_on(CFG, data, setting, "cut")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), params, resumed))
    kept = [[(line["step"], line["loss"]) for line in lines_of(setting, name)] for name in ("whole", "cut")]
    assert kept[0] == kept[1]


def test_curriculum_shows_lengths_when_they_are_due(setting, data):
    cfg = dataclasses.replace(CFG, phases=(Phase(0.5, 1), Phase(0.5, 2)), rows=2)
    source = sft.Curriculum(cfg, data, setting)
    short = max(len(e) for steps, e in data if steps == 1)
    longest = []
    for step in range(8):
        batch, _ = source.next(type("State", (), {"step": step}))
        longest.append(int(batch.positions.max()) + 1)
    assert max(longest[:4]) <= short < max(longest[4:])


def test_loss_and_gradient_do_not_depend_on_microbatches_or_packing(setting, data):
    params = setting.init_params()
    model = dataclasses.replace(setting.model, load_balance_coef=0.0)  # the router's loss is a mean per slice by nature
    chosen = [e for _, e in data[::6]]
    rows = packing.pack_rows(chosen, len(chosen), 200)  # some empty: as many as of runs alone, for one program; runs in both halves
    packed = packing.to_batch(rows[::2] + rows[1::2], 200)
    assert (packed.mask.sum(1) > 0).reshape(2, -1).any(1).all() and not packed.mask.any(1).all()
    alone = packing.to_batch([[e] for e in chosen], 200)

    def step(batch, microbatches):
        made = sft.jitted_step(model, 2, "domain_mean", 256, None, microbatches, bind(optim.adamw))
        return made(train.init_state(params, optim.adamw(setting.specs, 1), 0), batch)[1]

    reference = step(packed, 1)
    for other in (step(packed, 2), step(alone, 1)):
        for name in ("loss", "grad_norm", "ce/loss", "ce/accuracy", "ce/tokens"):
            np.testing.assert_allclose(other[name], reference[name], rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"rows": 5, "microbatches": 2}, {"phases": (Phase(0.5, 1),)}])
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ConfigError, match="SftConfig"):
        SftConfig(**changes)


def test_under_a_mesh_the_stage_is_the_one_of_one_device(setting, data):
    """One layer of attention: that delta nets are cut over devices as well is in tests/models/test_parallel.py."""
    cfg = dataclasses.replace(CFG, steps=3, save_every=2, optimizer=bind(optim.adamw, learning_rate=1e-3))
    model = dataclasses.replace(setting.model, num_experts=4, num_layers=1, full_attention_interval=1)  # an expert a device
    setting = dataclasses.replace(setting, model=model)
    plain = train_on(cfg, data, setting, "plain")
    meshed = dataclasses.replace(setting, mesh=make_mesh(MeshConfig({"context": 2, "expert": 2})))
    spread = train_on(cfg, data, meshed, "meshed")
    experts = spread["blocks"]["0"]["mlp"]["experts"]["down_proj"]
    assert len(experts.sharding.device_set) == 4 and "expert" in str(experts.sharding.spec)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)
    again = meshed.finished("meshed")  # read back where the mesh wants it
    assert again["blocks"]["0"]["mlp"]["experts"]["down_proj"].sharding.is_equivalent_to(experts.sharding, experts.ndim)


def test_another_optimizer_is_made_for_the_stages_length(setting, data, monkeypatch):
    mine, made = bind(own_optimizer, rate=0.1), []
    monkeypatch.setattr(sft, "jitted_step", lambda *args: made.append(args[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_on(dataclasses.replace(CFG, steps=7, optimizer=mine), data, setting, "own")
    assert made == [optim.program(mine, 7)] and made != [optim.program(mine, 1)]


def own_optimizer(specs, steps, *, rate):
    return optax.sgd(optax.linear_schedule(rate, 0.0, steps))


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match="needs 64 devices"):
        make_mesh(MeshConfig({"data": 64}))
