#!/usr/bin/env bash
# Several Cloud TPU slices as one run, the data-centre network between them. Not run yet, for want of the hardware.
#   NAME=my-slices SLICES=4 ZONE=us-west4-a SHARE=10.0.0.2:/runs bash experiments/pods/tpu_multislice.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NAME:?name of the queued resource}" "${ZONE:?its zone}" "${SHARE:?NFS share for runs, HOST:/PATH}"
SLICES=${SLICES:-2}
ACCELERATOR=${ACCELERATOR:-v5litepod-256}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
# A queued resource is the only way to slices that know of each other.
if ! gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
  gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --node-count="$SLICES" --node-prefix="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$VERSION" --spot
fi
until [ "$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)')" = ACTIVE ]
do sleep 30; done
# What is committed, and nothing else of this folder.
archive=$(mktemp -d)/anyexperts_jax.tgz
git archive --prefix=anyexperts_jax/ --output="$archive" HEAD
gcloud compute tpus queued-resources scp "$archive" "$NAME": --zone="$ZONE" --worker=all --node=all
# Each slice holds the whole model and its share of the batch: only gradients cross the slow network.
gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --worker=all --node=all \
  --command="tar xzf anyexperts_jax.tgz && bash anyexperts_jax/experiments/pods/tpu_host.sh $SHARE \
--set mesh.dcn_data=$SLICES --set train.batch_size=$((256 * SLICES))"
gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --worker=0 --node=0 \
  --command="sudo journalctl -fu anyexperts -o cat"
