#!/usr/bin/env bash
# The part that runs on a TPU VM; tpu.sh copies it there with the project and calls it.
#
#   worker.sh setup         installs; copies DATA
#   worker.sh start FLAGS   fetches what an earlier machine saved, then runs treepo_jax.main FLAGS
#   worker.sh state         how the run is, in one line
#   worker.sh stop          ends the run as Ctrl-C would and waits until it is saved
#
# The run's workdir is a folder of this machine. STORE says how it outlives the machine: `copy`, a
# copy at BUCKET/RUN, renewed every SYNC_SECONDS and at the end (one worker); `mount`, the bucket
# itself, mounted (several workers, which write one workdir); `none`. treepo_jax.main takes no
# gs:// path for its workdir.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RUN="${RUN:-}"
STORE="${STORE:-none}"
BUCKET="${BUCKET:-}"
DATA="${DATA:-}"
CONTROL="runs/.$RUN" # log.txt, pid, status, stopped, uploaded/STEP
MOUNT="runs/.bucket"
WORKDIR="runs/$RUN"
if [[ "$STORE" == mount ]]; then
  folder="${BUCKET#gs://}/" # BUCKET/ or BUCKET/FOLDER/
  WORKDIR="$MOUNT/${folder#*/}$RUN"
fi

say() { printf 'worker.sh: %s\n' "$*" >&2; }

setup() {
  if [[ ! -x .venv/bin/python ]]; then
    if python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      2> /dev/null; then
      python3 -m venv .venv
    else
      say "python3 is older than 3.11 or has no venv: uv installs another beside it"
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
  fi
  .venv/bin/python -m pip install --quiet --editable '.[tpu]'
  local pair
  for pair in $DATA; do
    mkdir -p "${pair#*=}"
    gcloud storage rsync --recursive "${pair%%=*}" "${pair#*=}"
  done
}

start() {
  if alive; then
    say "$RUN runs already: nothing was started"
    return
  fi
  mkdir -p "$CONTROL/uploaded"
  case "$STORE" in
    copy) pull ;;
    mount) attach ;;
  esac
  rm -f "$CONTROL/status" "$CONTROL/stopped"
  # A session of its own, so that it outlives this login and can be ended as one group.
  setsid nohup bash tpu_scripts/worker.sh work "$@" >> "$CONTROL/log.txt" 2>&1 < /dev/null &
  echo $! > "$CONTROL/pid"
}

# Runs the program to its end and copies its workdir meanwhile.
work() {
  local program status=0 next=$((SECONDS + SYNC_SECONDS))
  # Several workers are one run: each finds the others by what the TPU VM says.
  if [[ "$STORE" == mount ]]; then set -- "$@" --coordinator=auto; fi
  trap : TERM INT # the program gets them, too: it saves and ends, then the last copy is made
  .venv/bin/python -m treepo_jax.main "$@" --workdir="$WORKDIR" &
  program=$!
  while kill -0 "$program" 2> /dev/null; do
    sleep 1 & wait $! || true
    if ((SECONDS >= next)); then
      save
      next=$((SECONDS + SYNC_SECONDS))
    fi
  done
  wait "$program" || status=$?
  save
  echo "$status" > "$CONTROL/status"
}

# Copies what there is; a failure is told and left to the next time. It is a process of its own
# because the shell does not end at an error inside a condition.
save() {
  bash tpu_scripts/worker.sh push ||
    say "the workdir was not copied to $BUCKET/$RUN this time"
}

# Copies the workdir with its newest checkpoint to BUCKET/RUN. A checkpoint counts there only with
# its mark, which is set when it and the metrics up to it are complete: what a preemption cuts short
# is never restored.
push() {
  case "$STORE" in
    none) return ;;
    mount)
      mkdir -p "$WORKDIR/logs"
      cp "$CONTROL/log.txt" "$WORKDIR/logs/$(hostname).txt"
      if [[ -e "$WORKDIR/metrics.jsonl" ]]; then sync "$WORKDIR/metrics.jsonl"; fi
      return
      ;;
  esac
  local newest="" still="$CONTROL/still" path step
  if [[ -d "$WORKDIR/checkpoints" ]]; then
    newest="$(find "$WORKDIR/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' |
      sort -n | tail -n 1)"
  fi
  if [[ -n "$newest" && ! -e "$CONTROL/uploaded/$newest" ]]; then
    # Hard links, because the run may drop the checkpoint while it is copied.
    rm -rf "$still"
    cp -al "$WORKDIR/checkpoints/$newest" "$still"
    gcloud storage rsync --recursive --delete-unmatched-destination-objects \
      "$still" "$BUCKET/$RUN/checkpoints/$newest"
    rm -rf "$still"
  fi
  if [[ -d "$WORKDIR" ]]; then
    gcloud storage rsync --recursive --exclude='checkpoints/.*|.*\.part$' "$WORKDIR" "$BUCKET/$RUN"
  fi
  gcloud storage cp "$CONTROL/log.txt" "$BUCKET/$RUN/logs/$(hostname).txt"
  if [[ -z "$newest" || -e "$CONTROL/uploaded/$newest" ]]; then return; fi
  date -u > "$CONTROL/mark"
  gcloud storage cp "$CONTROL/mark" "$BUCKET/$RUN/uploaded/$newest"
  touch "$CONTROL/uploaded/$newest"
  for path in "$CONTROL"/uploaded/*; do # those that the run has dropped, now that there is a newer
    step="$(basename "$path")"
    if [[ -d "$WORKDIR/checkpoints/$step" || "$step" == "$newest" ]]; then continue; fi
    gcloud storage rm "$BUCKET/$RUN/uploaded/$step"
    gcloud storage rm --recursive "$BUCKET/$RUN/checkpoints/$step"
    rm "$path"
  done
}

# Fetches the run's copy onto a machine that has not got it, all or nothing.
pull() {
  local part="$CONTROL/pulled" mark step
  if [[ -d "$WORKDIR" ]]; then return; fi # what is here is as new as the copy, or newer
  if ! gcloud storage ls "$BUCKET/$RUN/" > "$CONTROL/found" 2> "$CONTROL/errors"; then
    if grep -q 'matched no objects' "$CONTROL/errors"; then
      say "$BUCKET/$RUN holds nothing: the run begins"
      return
    fi
    cat "$CONTROL/errors" >&2
    say "$BUCKET/$RUN cannot be read, and the run might begin anew beside it: nothing was started." \
      "Does the bucket exist, and may the VM's service account read and write it?"
    exit 1
  fi
  rm -rf "$part"
  mkdir -p "$part"
  gcloud storage rsync --recursive --exclude='checkpoints/.*|uploaded/.*|logs/.*' \
    "$BUCKET/$RUN" "$part"
  if grep -q '/uploaded/$' "$CONTROL/found"; then
    gcloud storage ls "$BUCKET/$RUN/uploaded/" > "$CONTROL/found"
    while read -r mark; do
      step="$(basename "$mark")"
      [[ "$step" =~ ^[0-9]+$ ]] || continue
      mkdir -p "$part/checkpoints/$step"
      gcloud storage rsync --recursive "$BUCKET/$RUN/checkpoints/$step" "$part/checkpoints/$step" \
        < /dev/null
      touch "$CONTROL/uploaded/$step"
    done < "$CONTROL/found"
  fi
  mv "$part" "$WORKDIR"
}

# Mounts the bucket, once.
attach() {
  local bucket="${BUCKET#gs://}" package="gcsfuse_${GCSFUSE}_amd64.deb"
  if mountpoint -q "$MOUNT"; then return; fi
  if ! command -v gcsfuse > /dev/null; then
    curl --fail --silent --show-error --location --output "$package" \
      "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/$package"
    sudo apt-get install --yes --quiet "./$package"
  fi
  mkdir -p "$MOUNT"
  # Orbax ends a checkpoint by renaming its folder, which gcsfuse limits to few files by default.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 "${bucket%%/*}" "$MOUNT"
  mkdir -p "$(dirname "$WORKDIR")"
}

alive() {
  local pid
  [[ -e "$CONTROL/pid" ]] || return 1
  pid="$(cat "$CONTROL/pid")"
  # The number alone may be another process's after a reboot.
  kill -0 "$pid" 2> /dev/null && grep -q worker.sh "/proc/$pid/cmdline"
}

state() {
  if alive; then
    echo "treepo run: running"
  elif [[ -e "$CONTROL/stopped" ]]; then
    echo "treepo run: stopped"
  elif [[ -e "$CONTROL/status" ]]; then
    echo "treepo run: ended $(cat "$CONTROL/status")"
  elif [[ -e "$CONTROL/pid" ]]; then
    echo "treepo run: killed"
  else
    echo "treepo run: none"
  fi
}

stop() {
  if alive; then
    touch "$CONTROL/stopped"
    kill -TERM -- "-$(cat "$CONTROL/pid")"
    while alive && ((SECONDS < STOP_SECONDS)); do sleep 1; done
  fi
  state
}

case "${1:-}" in
  setup | start | work | push | state | stop) "$@" ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' tpu_scripts/worker.sh
    exit 2
    ;;
esac
