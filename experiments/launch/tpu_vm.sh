#!/usr/bin/env bash
# Cloud TPU VMs: one slice or several, the same command on every host.
#
#     experiments/launch/tpu_vm.sh create     # asks for the slices; waits in a queue
#     experiments/launch/tpu_vm.sh install    # the checkout and its packages on every host; mount $SHARED yourself (Filestore or gcsfuse)
#     experiments/launch/tpu_vm.sh run        # starts or goes on with the run; output of all hosts, logs of process 0
#     experiments/launch/tpu_vm.sh delete
#
# A host that fails ends the others after 40 s without a sign of life; all of them then start again and go on from the last checkpoint.
set -euo pipefail

PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-a}
NAME=${NAME:-a1jax}
TYPE=${TYPE:-v5p-256}                   # one slice; v5p counts cores, two a chip: 128 chips on 32 hosts
SLICES=${SLICES:-1}                     # of that type; above 1 mesh.shape needs 'slice' with that size
VERSION=${VERSION:-v2-alpha-tpuv5}      # the TPU VM's runtime
EXPERIMENT=${EXPERIMENT:-}             # needed to run: an experiment file whose sizes fit MESH
MESH=${MESH:-"{'data': 4, 'fsdp': 16, 'context': 2}"}
SHARED=${SHARED:-/mnt/runs}             # a folder that all hosts share
RESTARTS=${RESTARTS:-20}
REPOSITORY=${REPOSITORY:-}              # where `git clone` finds this checkout, for install

# One command for every host: jax asks the TPU's metadata who the others are.
COMMAND="a1jax run $EXPERIMENT --workdir $SHARED/$NAME --coordinator auto --set \"mesh.shape=$MESH\""

on_every_host() {
    for i in $(seq 0 $((SLICES - 1))); do
        gcloud compute tpus tpu-vm ssh "$NAME-$i" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1" &
    done
    local failed=0 job
    for job in $(jobs -p); do wait "$job" || failed=1; done
    return "$failed"
}

case ${1:-} in
create)
    nodes=(--node-id="$NAME-0")
    if [ "$SLICES" -gt 1 ]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$VERSION" "${nodes[@]}"
    ;;
install)
    on_every_host "rm -rf a1jax && git clone --depth 1 $REPOSITORY a1jax && cd a1jax && python3 -m venv ~/venv && ~/venv/bin/pip install -q -e . 'jax[tpu]'"
    ;;
run)
    [ -n "$EXPERIMENT" ] || { echo "EXPERIMENT is empty: give an experiment file whose sizes fit MESH=$MESH" >&2; exit 2; }
    # Exit code 2 is a mistake in the command: starting again would make it again.
    on_every_host "cd a1jax && PATH=\$HOME/venv/bin:\$PATH
        for try in \$(seq 0 $RESTARTS); do
            $COMMAND && exit 0; code=\$?
            [ \$code -eq 2 ] && exit 2
            echo \"ended with \$code, starting again (\$try of $RESTARTS)\" >&2; sleep 10
        done; exit \$code"
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force
    ;;
*)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
