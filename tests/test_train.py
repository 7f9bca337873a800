"""The one train step and its loop, on a model small enough to know by hand."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.checkpointers import async_checkpointer

from a1jax import checkpoint, metrics, train
from a1jax.config import ConfigError
from a1jax.types import TrainState


def loss(params, batch, share):
    error = params["w"] * batch["x"] - batch["y"]
    return jnp.sum(batch["weights"] * error**2), {"error": jnp.sum(batch["weights"] * jnp.abs(error)), "parts": jnp.float32(share)}


def weigh(batch):
    return {**batch, "weights": batch["mask"] / jnp.maximum(jnp.sum(batch["mask"]), 1.0)}


BATCH = {"x": jnp.array([1.0, 2.0, 3.0, 4.0]), "y": jnp.array([2.0, 4.0, 7.0, 0.0]), "mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
TX = optax.sgd(0.1)


def start():
    return train.init_state({"w": jnp.array(1.0)}, TX, seed=0)


def test_golden_step_by_hand():
    # errors 1*x - y = -1, -2, -4 on three tokens; gradient = 2/3 (1*-1 + 2*-2 + 3*-4) = -34/3; w = 1 + 34/30
    state, out = jax.jit(train.make_train_step(loss, TX, 1, weigh))(start(), BATCH)
    np.testing.assert_allclose(state.params["w"], 1 + 34 / 30, rtol=1e-6)
    np.testing.assert_allclose([out["loss"], out["error"], out["grad_norm"]], [7.0, 7 / 3, 34 / 3], rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("microbatches", [2, 4])
def test_value_gradient_and_metrics_do_not_depend_on_microbatches(microbatches):
    whole, out = train.make_train_step(loss, TX, 1, weigh)(start(), BATCH)
    parts, out_parts = train.make_train_step(loss, TX, microbatches, weigh)(start(), BATCH)
    np.testing.assert_allclose(whole.params["w"], parts.params["w"], rtol=1e-6)
    for name in out:
        np.testing.assert_allclose(out[name], out_parts[name], rtol=1e-6)


def test_initial_state_owns_its_parameters():
    params = {"w": jnp.array(1.0)}
    step = jax.jit(train.make_train_step(loss, TX, 1, weigh), donate_argnums=(0,))
    step(train.init_state(params, TX, 0), BATCH)
    assert float(params["w"]) == 1.0  # not donated away


class Counting:
    """A source whose batches depend on its position."""

    def __init__(self, fail_at=None):
        self.position, self.fail_at, self.seen = 0, fail_at, []

    def next(self, state: TrainState):
        if self.position == self.fail_at:
            raise KeyboardInterrupt
        self.position += 1
        self.seen.append(self.position)
        return {**BATCH, "y": BATCH["y"] * self.position}, {"tokens": 4}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def fit(folder, source, **changes):
    with metrics.Writer(folder) as writer:
        settings = {
            "steps": 7,
            "stage": "sft",
            "directory": folder / "checkpoints",
            "writer": writer,
            "save_every": 2,
            "keep": 2,
            "log_every": 1,
        }
        return train.fit(start(), jax.jit(train.make_train_step(loss, optax.sgd(0.01), 1, weigh)), source, **{**settings, **changes})


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = fit(tmp_path / "whole", Counting())
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", Counting(fail_at=5))  # the last checkpoint is of step 4, the last line of step 5
    again = Counting()
    resumed = fit(tmp_path / "cut", again)
    assert again.seen == [5, 6, 7]
    assert (np.asarray(whole.params["w"]) == np.asarray(resumed.params["w"])).all() and int(resumed.step) == 7
    lines = [[(x["step"], x["loss"]) for x in metrics.read(tmp_path / name)] for name in ("whole", "cut")]
    assert lines[0] == lines[1] and len(lines[0]) == 7


def test_a_finished_loop_does_nothing_more(tmp_path):
    fit(tmp_path, Counting())
    source = Counting()
    assert int(fit(tmp_path, source).step) == 7 and source.seen == []


def test_probe_is_asked_before_during_and_after(tmp_path):
    fit(tmp_path, Counting(), probe=lambda params: {"w": float(params["w"])}, probe_every=3)
    assert [x["step"] for x in metrics.read(tmp_path) if x["stage"] == "sft/probe"] == [0, 3, 6, 7]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    source = Counting()
    source.position = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        fit(tmp_path, source)


def test_training_goes_on_while_a_save_is_being_written(tmp_path, monkeypatch):
    may_write, wait, seen = threading.Event(), async_checkpointer._background_wait_for_commit_futures, []

    def slow(*args, **more):
        assert may_write.wait(60)
        return wait(*args, **more)

    class Watching(Counting):
        def next(self, state):
            seen.append((self.position, checkpoint.latest(tmp_path / "checkpoints")))
            if self.position == 6:
                may_write.set()
            return super().next(state)

    monkeypatch.setattr(async_checkpointer, "_background_wait_for_commit_futures", slow)
    fit(tmp_path, Watching(), save_every=4)
    assert seen == [(n, None) for n in range(7)]  # three steps are trained while the save of step 4 waits for its file system
    assert checkpoint.latest(tmp_path / "checkpoints") == 7


def test_a_save_that_fails_in_the_background_stops_the_run_in_one_line(tmp_path, monkeypatch, capfd):
    fit(tmp_path, Counting(), steps=2)

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    class Patient(Counting):
        def next(self, state):
            time.sleep(0.5 if self.position > 3 else 0)
            return super().next(state)

    monkeypatch.setattr(async_checkpointer, "_background_wait_for_commit_futures", full)
    source = Patient()
    with pytest.raises(ConfigError, match=r"could not be saved \(.*No space left on device.*goes on from step 2") as error:
        fit(tmp_path, source, steps=100, save_every=4)
    assert "\n" not in str(error.value) and source.position <= 8  # the save of step 8 tells at the latest
    assert "Traceback" not in capfd.readouterr().err
