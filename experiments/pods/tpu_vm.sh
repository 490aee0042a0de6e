#!/usr/bin/env bash
# One Cloud TPU slice of any size: every host runs the same command. Not run yet, for want of the hardware.
#   TPU=my-slice ZONE=us-west4-a SHARE=10.0.0.2:/runs bash experiments/pods/tpu_vm.sh
# Run it again after a preemption: it makes the slice anew and the run goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TPU:?name of the slice, new or there}" "${ZONE:?its zone}" "${SHARE:?NFS share for runs, HOST:/PATH}"
ACCELERATOR=${ACCELERATOR:-v5litepod-256}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}

if ! gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" >/dev/null 2>&1; then
  gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$ACCELERATOR" --version="$VERSION" --spot
fi
# What is committed, and nothing else of this folder.
archive=$(mktemp -d)/anyexperts_jax.tgz
git archive --prefix=anyexperts_jax/ --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU": --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="tar xzf anyexperts_jax.tgz && bash anyexperts_jax/experiments/pods/tpu_host.sh $SHARE"
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command="sudo journalctl -fu anyexperts -o cat"
