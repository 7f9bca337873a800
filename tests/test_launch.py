"""The launch scripts: they parse, and what each runs on a host is one command that a1jax understands."""

import os
import pathlib
import subprocess

import pytest
import yaml

from a1jax import config, distributed, main

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "experiments/launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

FILE = "experiments/six_domains.py"


@pytest.fixture()
def host(tmp_path):
    """host(words, input, **environment): (exit code, stderr, calls) on a machine whose a1jax, gcloud, srun and scontrol write down their
    words; gcloud and srun run what they are given, a1jax ends with $CODE."""
    programs = {
        "a1jax": 'printf "%s\\0" "$@" >> $CALLS/a1jax; printf "\\n" >> $CALLS/a1jax; exit ${CODE:-0}',
        "gcloud": 'echo "$@" >> $CALLS/gcloud; for word in "$@"; do case $word in --command=*) eval "${word#--command=}";; esac; done',
        "srun": 'echo "$1" >> $CALLS/srun; exec "$@"',
        "scontrol": 'echo "$@" >> $CALLS/scontrol',
        "sleep": "exit 0",
    }
    for folder in ("bin", "calls", "a1jax"):
        (tmp_path / folder).mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(words, **environment):
        folders = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(tmp_path / "calls")}
        env = {**folders, "SLURM_JOB_ID": "7", "EXPERIMENT": FILE, **environment}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        calls = {file.name: file.read_text() for file in (tmp_path / "calls").iterdir()}
        return done.returncode, done.stderr, calls

    return run


def understood(call: str) -> dict:
    """What a1jax makes of its words; the experiment is real, its sizes are not asked."""
    args = main._parser().parse_args(call.strip("\n").rstrip("\0").split("\0"))
    cfg = config.override(config.load(str(ROOT / args.file)), args.set)
    return {"file": args.file, "mesh": cfg.mesh.shape, "workdir": args.workdir, "coordinator": args.coordinator}


def pod() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash\n")


def test_on_every_platform_it_is_the_same_command(host):
    """But for the folder of runs, and that a TPU VM's environment does not tell that there are several hosts."""
    (code, err, calls), found = host([LAUNCH / "slurm.sh"], SLURM_NNODES="4"), {}
    assert code == 0 and calls["srun"] == "a1jax\n" and "scontrol" not in calls, err
    found["slurm"] = understood(calls["a1jax"])
    container = pod()["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]} | {"EXPERIMENT": FILE}
    code, err, calls = host([*container["command"], *container["args"]], **environment)
    assert code == 0, err
    found["gke"] = understood(calls["a1jax"].split("\n")[1])
    code, err, calls = host([LAUNCH / "tpu_vm.sh", "run"])
    assert code == 0 and "--worker=all" in calls["gcloud"], err
    found["tpu"] = understood(calls["a1jax"].split("\n")[2])
    assert {one["file"] for one in found.values()} == {FILE}
    assert all(one["workdir"].endswith("runs/a1jax") for one in found.values())
    assert found["gke"]["mesh"] == found["tpu"]["mesh"] == {"data": 4, "fsdp": 16, "context": 2} and found["slurm"]["mesh"] == {"fsdp": 32}
    assert {name: one["coordinator"] for name, one in found.items()} == {"slurm": None, "gke": None, "tpu": "auto"}
    assert distributed.arguments(found["tpu"]["coordinator"]) == {}


@pytest.mark.parametrize(("code", "again"), [("1", True), ("2", False)])
def test_a_failure_starts_again_but_not_a_mistake(host, code, again):
    ended, _, calls = host([LAUNCH / "slurm.sh"], CODE=code)
    assert ended == int(code) and ("scontrol" in calls) == again and (not again or calls["scontrol"] == "requeue 7\n")
    ended, _, calls = host([LAUNCH / "slurm.sh"], CODE=code, SLURM_RESTART_COUNT="20")
    assert ended == int(code) and calls.get("scontrol", "") == ("requeue 7\n" if again else "")  # no further one
    before = calls["a1jax"].count("\n")
    ended, _, calls = host([LAUNCH / "tpu_vm.sh", "run"], CODE=code, RESTARTS="3")
    assert ended == 1 and calls["a1jax"].count("\n") - before == (4 if again else 1)


def test_the_jobset_restarts_all_and_not_after_a_mistake():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    job = pod()
    assert job["backoffLimit"] == 0 and job["parallelism"] == job["completions"] and job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    chips = job["completions"] * job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
    x, y, z = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(x) * int(y) * int(z) == chips == 128
