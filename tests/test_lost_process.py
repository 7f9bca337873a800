"""Two real processes over gloo: one is killed, the other says so and ends, both go on; told to stop, both save the same step."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from a1jax import checkpoint, lost_process, metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]

CHILD = textwrap.dedent("""
    import pathlib, sys, time
    import jax
    import numpy as np, jax.numpy as jnp, optax

    folder, port, rank, pause = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, heartbeat_timeout_seconds=10)
    from a1jax import interruption, lost_process, metrics, sharding, train, types

    mesh = sharding.make_mesh({"fsdp": 4})
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))

    def place(x, spec=rows):
        return jax.make_array_from_callback(x.shape, spec, lambda index: x[index])

    class Source:
        position = 0

        def next(self, state):
            time.sleep(pause)
            self.position += 1
            return place(np.random.default_rng(self.position).normal(size=(8, 16)).astype(np.float32)), {}

        def get_state(self):
            return {"position": self.position}

        def set_state(self, state):
            self.position = state["position"]

    def loss(params, batch, share):
        return jnp.mean((batch @ params["w"] - 1.0) ** 2), {}

    tx = optax.adam(0.01)
    begin = lambda w: types.TrainState(jnp.zeros((), jnp.int32), {"w": w}, tx.init({"w": w}), jax.random.key(0))
    state = jax.jit(begin)(place(np.ones((16, 16), np.float32)))
    with jax.set_mesh(mesh), metrics.Writer(folder / str(rank)) as writer:
        try:
            state = train.fit(state, jax.jit(train.make_train_step(loss, tx)), Source(), steps=30, stage="sft",
                              directory=folder / "checkpoints", writer=writer, save_every=5, keep=2, log_every=1)
        except BaseException as error:
            print(f"a1jax: {error}", file=sys.stderr, flush=True)
            lost_process.part(error)
            raise
""")


def start(folder, pause=0.0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-c", CHILD, str(folder), str(port)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen([*words, str(rank), str(pause)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def ended(processes, seconds=120):
    """(exit code, standard error) of each."""
    try:
        return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=seconds)]]
    finally:
        for process in processes:
            process.kill()


def steps(folder, rank=0):
    return [line["step"] for line in metrics.read(folder / str(rank))]


def until(processes, happened):
    for _ in range(1800):
        if happened() or any(process.poll() is not None for process in processes):
            return
        time.sleep(0.1)


def parameters(folder):
    import jax

    return np.asarray(checkpoint.load_params(folder / "checkpoints", {"w": jax.ShapeDtypeStruct((16, 16), np.float32)}, step=30)["w"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The parameters of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert [code for code, _ in ended(start(folder))] == [0, 0]
    return parameters(folder)


def goes_on(folder, whole):
    before = checkpoint.latest(folder / "checkpoints")
    results = ended(start(folder))
    assert [code for code, _ in results] == [0, 0], results
    assert steps(folder, 0) == list(range(1, 31)) and steps(folder, 1) == []  # process 0 alone writes
    np.testing.assert_array_equal(parameters(folder), whole)
    return before


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_with_a_line_and_both_go_on(tmp_path, whole, victim):
    processes = start(tmp_path, pause=0.3)
    until(processes, lambda: 12 in steps(tmp_path))
    processes[victim].kill()
    results = ended(processes)
    assert results[victim][0] == -signal.SIGKILL
    code, err = results[1 - victim]
    last = err.rstrip().splitlines()[-1]
    assert code == lost_process.LOST, err
    assert last.startswith("a1jax: process 1 of 2 was lost (silent for" if victim else "a1jax: process 0, the coordinator, was lost"), err
    step = goes_on(tmp_path, whole)  # 10, or under load one that was complete by then
    assert step in range(5, 30, 5) and last.endswith(f"start the same command again on every host: sft goes on from step {step}")


def test_both_stop_at_one_step_when_one_is_told_to(tmp_path, whole):
    processes = start(tmp_path, pause=0.3)
    until(processes, lambda: 7 in steps(tmp_path))
    processes[1].send_signal(signal.SIGTERM)
    results = ended(processes)
    step = checkpoint.latest(tmp_path / "checkpoints")
    assert [code for code, _ in results] == [143, 143], results
    for _, err in results:
        assert f"a1jax: interrupted by SIGTERM: sft is saved at step {step}; the same command goes on from there" in err
    assert steps(tmp_path, 0)[-1] == step and 7 <= step < 30 and steps(tmp_path, 1) == []  # process 0 alone writes
    assert goes_on(tmp_path, whole) == step
