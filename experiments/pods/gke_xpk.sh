#!/usr/bin/env bash
# TPU slices of a GKE cluster, by xpk (pip install xpk). Not run yet, for want of the hardware.
#   CLUSTER=my-cluster PROJECT=my-project ZONE=us-west4-a STORAGE=my-filestore bash experiments/pods/gke_xpk.sh
# The cluster and a Filestore instance come first: `xpk cluster create`, `xpk storage create`.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CLUSTER:?name of the cluster}" "${PROJECT:?its project}" "${ZONE:?its zone}" "${STORAGE:?name of its storage}"
TPU_TYPE=${TPU_TYPE:-v5litepod-256}
WORKLOAD=${WORKLOAD:-anyexperts-$(date +%m%d-%H%M)}

# Every pod must see the run directory.
xpk storage attach "$STORAGE" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --type=gcpfilestore --vol=default --auto-mount=true --mount-point=/runs --readonly=false
# --script-dir goes into the image, where the command runs: what is committed here, and nothing else.
source=$(mktemp -d)
git archive HEAD | tar -x -C "$source"
# `exec`, so that SIGTERM reaches the trainer; the grace period is for its checkpoint, and a restart goes on from there.
# More slices: --num-slices, and mesh.dcn_data and train.batch_size as in tpu_multislice.sh.
xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices=1 \
  --base-docker-image=python:3.12 --script-dir="$source" \
  --max-restarts=50 --termination-grace-period-seconds=300 \
  --command="pip install --quiet '.[tpu]' && exec anyexperts train experiments/pods/ling_mini_2.toml \
--run /runs/ling_mini_2 --processes auto --set runtime.compile_cache=/runs/programs"
