#!/bin/bash
# One node's part of a training on several: rank 0 runs the stage, the others help. slurm/train.sbatch and skypilot.yaml call it.
#   KOALA_RANK=0 KOALA_NODES=2 KOALA_GPUS=8 KOALA_FIRST=node-1 infra/node.sh koala-700m
# KOALA_MACHINE names a row of `machines` with `distill: {launch: runs/launch.yaml}`: rank 0 writes that file, for as many nodes and GPUs
# as there are. The nodes share the checkout.
set -euo pipefail

student=${1:?usage: node.sh STUDENT}
: "${KOALA_RANK:?}" "${KOALA_NODES:?}" "${KOALA_GPUS:?}" "${KOALA_FIRST:?}"
base=${KOALA_LAUNCH:-infra/accelerate/two-nodes.yaml}
launch=runs/launch.yaml

if [ "$KOALA_RANK" = 0 ]; then
    mkdir -p runs
    # Whole or not at all: the others wait for it.
    sed -e "s/^num_machines:.*/num_machines: $KOALA_NODES/" \
        -e "s/^num_processes:.*/num_processes: $((KOALA_NODES * KOALA_GPUS))/" \
        -e "s/^main_process_ip:.*/main_process_ip: $KOALA_FIRST/" "$base" >"$launch.$$"
    mv "$launch.$$" "$launch"
    exec koala distill "$student"
fi
for _ in $(seq 300); do
    [ -e "$launch" ] && grep -q "^main_process_ip: $KOALA_FIRST$" "$launch" && break
    sleep 1
done
exec koala distill "$student" --machine-rank "$KOALA_RANK"
