"""Real processes over gloo: one is killed, the others say so and end, all go on; told to stop, all save the same step."""

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

    port, (rank, processes, heartbeat), pause = sys.argv[1], map(int, sys.argv[2].split(",")), float(sys.argv[3])
    folders = [pathlib.Path(name) for name in sys.argv[4:]]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank, heartbeat_timeout_seconds=heartbeat)
    from a1jax import interruption, lost_process, metrics, sharding, train, types

    mesh = sharding.make_mesh({"fsdp": 2 * processes})
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
    begin = jax.jit(lambda w: types.TrainState(jnp.zeros((), jnp.int32), {"w": w}, tx.init({"w": w}), jax.random.key(0)))
    step = jax.jit(train.make_train_step(loss, tx))
    for folder in folders:
        state = begin(place(np.ones((16, 16), np.float32)))
        with jax.set_mesh(mesh), metrics.Writer(folder / str(rank)) as writer:
            try:
                state = train.fit(state, step, Source(), steps=30, stage="sft", directory=folder / "checkpoints", writer=writer,
                                  save_every=5, keep=2, log_every=1)
            except BaseException as error:
                print(f"a1jax: {error}", file=sys.stderr, flush=True)
                lost_process.part(error)
                raise
""")


def start(*folders, pause=0.0, processes=2, heartbeat=10):
    """Processes that train in one folder after the other. heartbeat: seconds of silence after which jax aborts the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-c", CHILD, str(port)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [*words, f"{rank},{processes},{heartbeat}", str(pause), *map(str, folders)],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def ended(processes, seconds=240):
    """(exit code, standard error) of each."""
    try:
        return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=seconds)]]
    finally:
        for process in processes:
            process.kill()


def steps(folder, rank=0):
    return [line["step"] for line in metrics.read(folder / str(rank))]


def each_once(waiting):
    """waiting: (processes, step, folder, what to do when the folder has it or they have ended), whichever comes first."""
    for _ in range(1800):
        for entry in list(waiting):
            processes, step, folder, act = entry
            if step in steps(folder) or any(process.poll() is not None for process in processes):
                act()
                waiting.remove(entry)
        if not waiting:
            return
        time.sleep(0.1)


def parameters(folder):
    import jax

    return np.asarray(checkpoint.load_params(folder / "checkpoints", {"w": jax.ShapeDtypeStruct((16, 16), np.float32)}, step=30)["w"])


def go_on(*folders):
    """The same command again for folders that were cut, and once uninterrupted. Returns the steps they went on from."""
    before = [checkpoint.latest(folder / "checkpoints") for folder in folders]
    whole = folders[0].with_name("whole")
    results = ended(start(*folders, whole))
    assert [code for code, _ in results] == [0, 0], results
    for folder in folders:
        assert steps(folder, 0) == list(range(1, 31)) and steps(folder, 1) == []  # process 0 alone writes
        np.testing.assert_array_equal(parameters(folder), parameters(whole))
    return before


def check_lost(results, victim, step):
    assert results[victim][0] == -signal.SIGKILL
    lost = f"process {victim} of {len(results)} was lost (silent for" if victim else "process 0, the coordinator, was lost"
    for code, err in results[:victim] + results[victim + 1 :]:
        check_survivor(code, err, lost, step)


def check_survivor(code, err, lost, step):
    last = err.rstrip().splitlines()[-1]
    assert code == lost_process.LOST, err
    assert last.startswith(f"a1jax: {lost}"), err
    # 10, or under load one that was complete by then
    assert step in range(5, 30, 5) and last.endswith(f"start the same command again on every host: sft goes on from step {step}")


def test_a_killed_process_ends_the_other_with_a_line_and_a_told_one_both_at_one_step_and_all_go_on(tmp_path):
    """Both at once: much of either is waiting. jax aborts the first's survivor before a few seconds of silence say who is missing."""
    killed, told = tmp_path / "killed", tmp_path / "told"
    first, second = start(killed, pause=0.4, heartbeat=5), start(told, pause=0.4)
    each_once([(first, 12, killed, first[1].kill), (second, 7, told, lambda: second[1].send_signal(signal.SIGTERM))])
    lost, stopped = ended(first), ended(second)
    last = steps(told, 0)[-1]
    assert 7 <= last < 30 and steps(told, 1) == []
    from_lost, from_stopped = go_on(killed, told)
    check_lost(lost, 1, from_lost)
    assert [code for code, _ in stopped] == [143, 143] and from_stopped == last, stopped
    for _, err in stopped:
        assert f"a1jax: interrupted by SIGTERM: sft is saved at step {last}; the same command goes on from there" in err


@pytest.mark.slow
def test_a_killed_coordinator_ends_the_other_with_a_line_and_both_go_on(tmp_path):
    processes = start(tmp_path / "killed", pause=0.3)
    each_once([(processes, 12, tmp_path / "killed", processes[0].kill)])
    results = ended(processes)
    (step,) = go_on(tmp_path / "killed")
    check_lost(results, 0, step)


@pytest.mark.slow
@pytest.mark.parametrize("heartbeat", [4, 10])
def test_all_survivors_name_the_lost_one_also_those_whose_collective_hangs(tmp_path, heartbeat):
    """Of four in a ring, one has no lost neighbour; it must not take the coordinator, which ends too, for the lost one."""
    processes = start(tmp_path / "killed", pause=0.2, processes=4, heartbeat=heartbeat)
    each_once([(processes, 12, tmp_path / "killed", processes[2].kill)])
    check_lost(ended(processes), 2, checkpoint.latest(tmp_path / "killed" / "checkpoints"))
