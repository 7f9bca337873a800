"""One program in several processes: how they find each other, what process 0 alone does, what all of them must agree on.

Without ``join`` there is one process and everything here is free of cost. With it every process runs the same lines in the same order;
whoever decides by a file, a clock or an environment asks process 0 (``from_first``), because a process that goes another way leaves the
others waiting in a sum that never comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from a1jax.config import ConfigError

T = TypeVar("T")

AUTO = "auto"  # as a coordinator: jax asks the platform
NAMES = {"coordinator": "A1JAX_COORDINATOR", "processes": "A1JAX_PROCESSES", "process": "A1JAX_PROCESS"}


def arguments(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, environ: Mapping[str, str] = os.environ
) -> dict[str, Any] | None:
    """What to call ``jax.distributed.initialize`` with; None where there is one process.

    coordinator: HOST:PORT of process 0; then processes and process are needed too. "auto": jax asks the platform, which a TPU VM needs,
    whose environment does not tell how many there are. Each may instead be in the environment (NAMES). Where none is given, Slurm
    (SLURM_NTASKS of a step) and TPUs on GKE (TPU_WORKER_HOSTNAMES, MEGASCALE_NUM_SLICES) are asked by jax when their variables say that
    there are several. Raises ConfigError for half of it, and for numbers that are none.
    """
    found = {"coordinator": coordinator, "processes": processes, "process": process}
    for name, variable in NAMES.items():
        if found[name] is None and environ.get(variable):
            found[name] = environ[variable] if name == "coordinator" else _number(environ[variable], variable)
    if found["coordinator"] == AUTO:
        return {}
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == 3:
        return {} if _platform_has_several(environ) else None
    if missing:
        options = ", ".join(f"--{name} (or {NAMES[name]})" for name in missing)
        raise ConfigError(f"several processes need --coordinator HOST:PORT, --processes N and --process I: give {options} too")
    host, _, port = found["coordinator"].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator {found['coordinator']}: write HOST:PORT of process 0, or auto")
    if found["processes"] < 1 or not 0 <= found["process"] < found["processes"]:
        raise ConfigError(f"--process {found['process']} of --processes {found['processes']}: processes are numbered 0 to N - 1")
    if found["processes"] == 1:
        return None
    return {"coordinator_address": found["coordinator"], "num_processes": found["processes"], "process_id": found["process"]}


def _number(text: str, variable: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{variable}={text}: give a whole number") from None


def _platform_has_several(environ: Mapping[str, str]) -> bool:
    # A Slurm batch script itself has SLURM_NTASKS too; only what srun starts has a step.
    slurm = int(environ.get("SLURM_NTASKS", 1)) if "SLURM_STEP_NODELIST" in environ else 1
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    return slurm > 1 or "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1


def join(found: dict[str, Any], silence: int = 100) -> None:
    """Joins the other processes: ``jax.distributed.initialize``. Before any device is touched. CPUs reduce over gloo.

    silence: seconds without a sign of life after which a process counts as lost, and jax ends the others.

    Raises ConfigError where the others do not come within ``initialization_timeout`` seconds (an argument of jax's).
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM before a1jax.interruption does
    if found:  # given, not asked of a platform: which may be Slurm all the same, and would then hand out one GPU per process
        found = {"cluster_detection_method": "deactivate", **found}
    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=silence)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes did not find each other: {str(error).partition(chr(10))[0]}") from error


def joined() -> bool:
    """Whether ``join`` was called, by whomever."""
    jax = sys.modules.get("jax")  # who has not imported it has not joined
    return jax is not None and jax.distributed.is_initialized()


def several() -> bool:
    """Whether this is one of several processes that have joined."""
    return joined() and sys.modules["jax"].process_count() > 1


def is_first() -> bool:
    """Whether this process writes what a run leaves: the only one, or number 0."""
    return not several() or sys.modules["jax"].process_index() == 0


def from_first(value: T) -> T:
    """Process 0's value on all of them; JSON must be able to hold it. All processes wait here for process 0."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    room = 1 << max(6, (length - 1).bit_length())  # few lengths, few programs
    sent = multihost_utils.broadcast_one_to_all(np.pad(text, (0, room - len(text))))
    return json.loads(np.asarray(sent, np.uint8)[:length].tobytes())


def by_first(act: Callable[[], Any]) -> None:
    """Process 0 does it, the others wait until it is done. What it raises is raised on all: a ConfigError as one, anything else as a
    RuntimeError, both with its text."""
    if not several():
        act()
        return
    error: Exception | None = None
    if is_first():
        try:
            act()
        except Exception as raised:
            error = raised
    kind, text = from_first(["", ""] if error is None else [_kind(error), str(error)])
    if error is not None:
        raise error
    if kind:
        raise ConfigError(text) if kind == "ConfigError" else RuntimeError(f"process 0: {kind}: {text}")


def _kind(error: Exception) -> str:
    name = type(error).__name__
    return "ConfigError" if isinstance(error, ConfigError) or name == "DataError" else name  # both are the user's to mend


def check_same(arrays: Any, what: str) -> None:
    """Raises RuntimeError, on all processes, where one holds other numpy arrays than process 0. What is compared is a digest."""
    if not several():
        return
    import jax
    from jax.experimental import multihost_utils

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    every = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint8)))
    others = [i for i in range(len(every)) if (every[i] != every[0]).any()]
    if others:
        raise RuntimeError(f"{what}: process {others[0]} has another one than process 0; something answered not alike to both")


def leave(code: int) -> None:
    """Ends this process at once where there are several: the orderly way waits for the others, who wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if several():
        if is_first():
            time.sleep(1.0)  # with process 0 goes the coordinator, and whoever still has the same mistake to report is killed
        os._exit(code)
