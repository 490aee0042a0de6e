#!/usr/bin/env bash
# What each host of a TPU slice does for tpu_vm.sh and tpu_multislice.sh: SHARE, then options of `anyexperts train`.
set -euo pipefail
share=$1 && shift
cd "$(dirname "$0")/../.."

# Checkpoints and logs must be on one file system that all hosts see.
sudo mkdir -p /runs
mountpoint -q /runs || sudo mount -t nfs -o nconnect=8 "$share" /runs

# The images come with Python 3.10; uv brings a newer one.
[ -x .venv-tpu/bin/anyexperts ] || {
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --python 3.12 .venv-tpu
  python3 -m uv pip install --quiet --python .venv-tpu/bin/python --editable '.[tpu]'
}

# A unit and no shell: it outlives the connection, gets SIGTERM with time for a checkpoint when the host goes down, and
# starts again after a lost host (exit code 5), but not after a wrong input, a loss that is not finite or a full disk.
sudo systemctl stop anyexperts 2>/dev/null || true
sudo systemd-run --unit=anyexperts --collect --uid="$(id -u)" --working-directory="$PWD" \
  --property=TimeoutStopSec=300 --property=Restart=on-failure --property=RestartSec=30 \
  --property=SuccessExitStatus=143 --property='RestartPreventExitStatus=2 3 4' \
  "$PWD/.venv-tpu/bin/anyexperts" train experiments/pods/ling_mini_2.toml --run /runs/ling_mini_2 --processes auto \
  --set runtime.compile_cache=/runs/programs "$@"
