#!/usr/bin/env bash
# One TPU VM or pod slice from creation to deletion.
#
#   tpu_scripts/tpu.sh create            # costs money from here on
#   tpu_scripts/tpu.sh setup             # copies this checkout and installs it on every worker
#   tpu_scripts/tpu.sh run --config=configs/tiny.py --workdir=runs/tiny
#   tpu_scripts/tpu.sh watch             # follows the first worker's log
#   tpu_scripts/tpu.sh delete            # and no longer
#
# DRY_RUN=1 prints the gcloud commands instead of running them. The settings below can be given in
# the environment. Not yet run against a real TPU.
set -euo pipefail

NAME="${NAME:-treepo}"
ZONE="${ZONE:-us-east5-a}"
TYPE="${TYPE:-v6e-8}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}"
SPOT="${SPOT:-1}" # 1: cheaper, and may be taken back; a run continues when started again
FOLDER="treepo_jax"

gcloud_tpu() {
  if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' gcloud compute tpus tpu-vm "$@" --zone="$ZONE"
    echo
  else
    gcloud compute tpus tpu-vm "$@" --zone="$ZONE"
  fi
}

on_workers() { gcloud_tpu ssh "$NAME" --worker="$1" --command="$2"; }

create() {
  local options=(--accelerator-type="$TYPE" --version="$RUNTIME")
  if [[ "$SPOT" == 1 ]]; then options+=(--spot); fi
  gcloud_tpu create "$NAME" "${options[@]}"
}

setup() {
  local archive
  archive="$(mktemp -d)/treepo_jax.tar.gz"
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud_tpu scp "$archive" "$NAME:treepo_jax.tar.gz" --worker=all
  on_workers all "mkdir -p $FOLDER && tar xzf treepo_jax.tar.gz -C $FOLDER && cd $FOLDER &&
    python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[tpu]'"
}

run() {
  local flags
  flags="$(printf '%q ' "$@")"
  on_workers all "cd $FOLDER && mkdir -p runs &&
    nohup .venv/bin/python -m treepo_jax.main $flags > runs/log.txt 2>&1 < /dev/null &"
}

watch() { on_workers 0 "tail -n 50 -f $FOLDER/runs/log.txt"; }

delete() { gcloud_tpu delete "$NAME" --quiet; }

case "${1:-}" in
  create | setup | run | watch | delete) "$@" ;;
  *)
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
