"""SIGTERM in the middle of real training: what is saved, how it ends, and that the same command goes on bitwise."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from a1jax import checkpoint, interruption, metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]

CHILD = textwrap.dedent("""
    import dataclasses, pathlib, sys, time
    import jax
    from a1jax import config, metrics
    from a1jax.rollout import lockstep
    from a1jax.stages import distill, experts, pipeline, scoring, sft

    stage, tokenizer, slow = sys.argv[1], sys.argv[2], sys.argv[3] == "slow"
    width = [f"model.{n}=8" for n in ("head_dim", "linear_key_head_dim", "linear_value_head_dim", "expert_width", "shared_expert_width")]
    cfg = config.override(config.load("experiments/quickstart.py:smoke"), [
        f"tokenizer.path={tokenizer!r}", "model.d_model=16", "model.num_experts=2", "model.num_layers=1",
        "model.full_attention_interval=1", *width, "sft.steps=8", "sft.save_every=100",
        "sft.rows=4", "sft.phases=()", "sft.log_every=1", "distill.steps=4", "distill.save_every=100", "distill.prompts=2"])
    if slow:  # a step that takes a second, a rollout that takes minutes
        dispatch, packed = lockstep.Lockstep.dispatch, sft.Packed.next
        steps = [0]
        run = distill.OnPolicy.next
        def counted(self, state):
            steps[0] += 1
            return run(self, state)
        def dispatched(self):
            time.sleep(1.0 if steps[0] > 2 else 0.0)
            return dispatch(self)
        def next_packed(self, state):
            time.sleep(0.3)
            return packed(self, state)
        distill.OnPolicy.next, lockstep.Lockstep.dispatch, sft.Packed.next = counted, dispatched, next_packed
    for folder in sys.argv[4:]:
        workdir = pathlib.Path(folder)
        with metrics.Writer(workdir) as writer:
            setting = pipeline.open_setting(cfg, workdir, writer)
            params = setting.init_params()
            if stage == "sft":
                data = [pair for i, d in enumerate(cfg.domains)
                        for pair in experts.examples(cfg.family(d), i, cfg.runs[d], "sft", 0, setting.tokenizer, False)]
                sft.run(cfg.sft, params, sft.Curriculum(cfg.sft, data, setting), setting)
            else:
                noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
                made = scoring.Teacher(noisy, setting.model, setting.tokenizer)
                distill.run(cfg.distill, params, dict.fromkeys(cfg.domains, made), setting)
""")


def child(*words):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, words)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("stage", "after"), [pytest.param("sft", 3, marks=pytest.mark.slow), ("distill", 2)])
def test_a_run_told_to_stop_saves_its_last_step_and_goes_on_bitwise(tmp_path, domain_tokenizer, stage, after):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = child(stage, domain_tokenizer.path, "slow", cut)
    for _ in range(1200):
        if process.poll() is not None or after in [line["step"] for line in metrics.read(cut)]:
            break
        time.sleep(0.1)
    time.sleep(1.5 if stage == "distill" else 0.0)  # the next rollout has begun by then
    process.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=60)  # promised are 30 s on a machine that does nothing else
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "Traceback" not in err
    step = checkpoint.latest(cut / f"stages/{stage}/checkpoints")
    assert step == max(line["step"] for line in metrics.read(cut)) and (step == after if stage == "distill" else after <= step < 8)
    process = child(stage, domain_tokenizer.path, "quick", cut, whole)
    try:
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err
    first, second = ([(x["step"], x["loss"]) for x in metrics.read(folder)] for folder in (cut, whole))
    assert first == second
    stored = [sorted((folder / f"stages/{stage}/checkpoints").iterdir())[-1].name for folder in (cut, whole)]
    assert stored[0] == stored[1]
    left, right = (leaves(folder / f"stages/{stage}/params") for folder in (cut, whole))
    assert len(left) == len(right) > 10
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(folder):
    import jax

    return jax.tree.leaves(checkpoint.load_params(folder, checkpoint.stored_params(folder)))


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a foreground job: a shell's background jobs ignore it, and with them the tests they run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_thrown_held_and_given_back(ctrl_c):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(interruption.Interrupted, match="interrupted by SIGTERM: the same command goes on") as stop:
        with interruption.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before and not interruption.is_told()
    with pytest.raises(interruption.Interrupted) as stop, interruption.listening():
        with interruption.holding():
            os.kill(os.getpid(), signal.SIGINT)
            until = time.monotonic() + 5
            while not interruption.asked() and time.monotonic() < until:
                time.sleep(0.01)
            assert interruption.asked() == signal.SIGINT
            interruption.point()  # not thrown while it is held
            with pytest.raises(interruption.Interrupted), interruption.abandonable():
                raise AssertionError("begun all the same")
    assert stop.value.code == 130
    elsewhere = []

    def listen():
        with interruption.listening():
            elsewhere.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert elsewhere == [before]  # only the main thread takes signals


def test_a_second_signal_ends_at_once():
    code = "import time\nfrom a1jax import interruption as i\nwith i.listening(), i.holding():\n    print(flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    try:
        process.send_signal(signal.SIGTERM)
        heard = process.stderr.readline()
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143 and err == "" and "a second signal ends the run at once" in heard
