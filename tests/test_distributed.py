import numpy as np
import pytest

from a1jax import distributed, main
from a1jax.config import ConfigError

GIVEN = {"coordinator_address": "host-0:1234", "num_processes": 4, "process_id": 3}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("words", "environ", "found"),
    [
        ((), {}, None),
        (("host-0:1234", 4, 3), {}, GIVEN),
        ((), {"A1JAX_COORDINATOR": "host-0:1234", "A1JAX_PROCESSES": "4", "A1JAX_PROCESS": "3"}, GIVEN),
        ((None, None, 3), {"A1JAX_COORDINATOR": "host-0:1234", "A1JAX_PROCESSES": "4", "A1JAX_PROCESS": "1"}, GIVEN),  # a word wins
        (("host-0:1234", 4, 3), SLURM | {"SLURM_STEP_NODELIST": "n[0-3]"}, GIVEN),
        (("host-0:1234", 1, 0), {}, None),
        (("auto",), {}, {}),
        ((), {"A1JAX_COORDINATOR": "auto"}, {}),
        ((), SLURM | {"SLURM_STEP_NODELIST": "n[0-3]"}, {}),
        ((), SLURM, None),  # the batch script, not a step
        ((), SLURM | {"SLURM_STEP_NODELIST": "n0", "SLURM_NTASKS": "1"}, None),
        ((), {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, {}),
        ((), {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ((), {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
    ],
)
def test_who_the_others_are(words, environ, found):
    assert distributed.arguments(*words, environ=environ) == found


@pytest.mark.parametrize(
    ("words", "environ", "message"),
    [
        (("host-0:1234",), {}, "give --processes (or A1JAX_PROCESSES), --process (or A1JAX_PROCESS) too"),
        ((None, 4, 1), {}, "give --coordinator (or A1JAX_COORDINATOR) too"),
        (("host-0", 4, 1), {}, "--coordinator host-0: write HOST:PORT of process 0, or auto"),
        (("host-0:http", 4, 1), {}, "--coordinator host-0:http: write HOST:PORT"),
        (("host-0:1234", 4, 4), {}, "--process 4 of --processes 4: processes are numbered 0 to N - 1"),
        (("host-0:1234", 0, 0), {}, "--process 0 of --processes 0"),
        ((), {"A1JAX_PROCESS": "first"}, "A1JAX_PROCESS=first: give a whole number"),
    ],
)
def test_half_of_it_is_refused_in_one_line(words, environ, message):
    with pytest.raises(ConfigError) as error:
        distributed.arguments(*words, environ=environ)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_takes_them(tmp_path, capsys):
    words = ["run", "experiments/quickstart.py", "--workdir", str(tmp_path / "run"), "--coordinator", "host-0:1234", "--process", "0"]
    assert main.main(words) == 2
    assert capsys.readouterr().err.startswith("a1jax: several processes need --coordinator HOST:PORT")
    assert not (tmp_path / "run").exists()


def test_one_process_is_the_first_and_waits_for_nobody():
    done = []
    assert distributed.is_first() and not distributed.several() and not distributed.joined()
    assert distributed.from_first({"a": (1,)}) == {"a": (1,)}
    distributed.by_first(lambda: done.append(1))
    distributed.check_same(np.ones(2), "an array")
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        distributed.by_first(lambda: 1 / 0)
    distributed.leave(3)  # returns: the caller's exit code is enough
