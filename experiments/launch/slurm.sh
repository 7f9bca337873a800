#!/usr/bin/env bash
# Slurm: one process a node, the same command in all of them.
#
#     sbatch --nodes=4 experiments/launch/slurm.sh
#     EXPERIMENT=path/to/yours.py sbatch --nodes=4 experiments/launch/slurm.sh
#
#SBATCH --job-name=a1jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM a minute before the time is up, or the node is taken: the run saves and ends, and the job goes on in the queue.
#SBATCH --signal=TERM@60
set -euo pipefail

EXPERIMENT=${EXPERIMENT:?an experiment file whose sizes fit MESH}
MESH=${MESH:-"{'fsdp': $((${SLURM_NNODES:-2} * 8))}"}   # its product is the number of GPUs
SHARED=${SHARED:-$PWD/runs}                             # on a file system that all nodes see
NAME=${NAME:-a1jax}
RESTARTS=${RESTARTS:-20}

# One process for all GPUs of a node: jax would otherwise hand out one GPU by the task's number on its node.
export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-8} - 1)))}

# One process that fails ends the others, by itself (--kill-on-bad-exit would hide its exit code); they go on together from the last
# checkpoint.
code=0
srun a1jax run "$EXPERIMENT" --workdir "$SHARED/$NAME" --set "mesh.shape=$MESH" || code=$?

# Exit code 2 is a mistake in the command: starting again would make it again.
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
