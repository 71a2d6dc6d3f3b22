#!/usr/bin/env bash
# A run on a TPU VM, a pod slice or several slices, from creation to deletion.
#
#   tpu.sh create             rents the machine of settings.sh: it costs from here on
#   tpu.sh setup              copies the last commit to every worker and installs it
#   tpu.sh run FLAGS          starts treepo_jax.main FLAGS on every worker; it goes on without you
#   tpu.sh watch [WORKER]     follows a worker's log
#   tpu.sh stop               ends the run as Ctrl-C would, saved; the machine stands and costs on
#   tpu.sh fetch [FOLDER]     copies the results here, checkpoints left out
#   tpu.sh delete             deletes the machine, after a question; the bucket stays
#
#   tpu.sh keep FLAGS         all of it until the run has ended: create, setup, run; again after
#                             each preemption. --delete: deletes the machine at the end
#   tpu.sh resume FLAGS       one round of keep: makes anew what was preempted and goes on
#   tpu.sh status             what stands in the project's zone, and so costs; ZONE=- all zones
#   tpu.sh types              the accelerator types of the zone
#
#   --dry-run prints the commands, --yes answers the question of delete.
#
# FLAGS are those of python -m treepo_jax.main without --workdir, which is the run's own (RUN).
# Settings: settings.sh or the environment. It ends with 2 for a mistake in what was given, 75 where
# there is no capacity now, 1 for other failures.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(dirname "$HERE")"
# shellcheck source-path=SCRIPTDIR
source "$HERE/settings.sh"
# shellcheck source-path=SCRIPTDIR
source "$HERE/cloud.sh"
# shellcheck source-path=SCRIPTDIR
source "$HERE/keep.sh"

DELETE_AT_END=0
ERRORS="$(mktemp)" # what the last gcloud wrote to stderr
ARCHIVE="${TMPDIR:-/tmp}/treepo_jax-$NAME.tar.gz"
trap 'rm -f "$ERRORS"' EXIT

# Whether it stands or not, this ends with a machine that is ready.
create() {
  local now=absent
  [[ "$DRY_RUN" == 1 ]] || now="$(machine)"
  case "$now" in
    ready) say "$NAME stands already: nothing was created" ;;
    pending) await ;;
    absent)
      request
      await
      ;;
    gone) refuse "$NAME was preempted: 'tpu.sh resume FLAGS' makes it anew and goes on" ;;
    stopped) refuse "$NAME is stopped: 'gcloud compute tpus tpu-vm start $NAME" \
      "--project=$PROJECT --zone=$ZONE', or 'tpu.sh delete'" ;;
    failed) refuse "the request $NAME has failed or expired ('tpu.sh status'): 'tpu.sh delete'," \
      "then again" ;;
  esac
}

request() {
  local flags
  flags=(--accelerator-type="$TYPE")
  if [[ "$SPOT" == 1 ]]; then flags+=(--spot); fi
  # shellcheck disable=SC2206 # parted by blanks on purpose
  flags+=($CREATE_FLAGS)
  if ! queued; then
    tpus tpu-vm create "$NAME" --version="$(image)" "${flags[@]}"
    return
  fi
  if [[ -n "$VALID_FOR" ]]; then flags+=(--valid-until-duration="$VALID_FOR"); fi
  if ((SLICES == 1)); then
    flags+=(--node-id="$NAME")
  else
    flags+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  tpus queued-resources create "$NAME" --runtime-version="$(image)" "${flags[@]}"
}

# Waits for a machine that was asked for.
await() {
  [[ "$DRY_RUN" == 0 ]] || return 0
  local now="" before=""
  while true; do
    now="$(machine)"
    case "$now" in
      ready) break ;;
      pending) ;;
      *)
        say "$NAME is $now: 'tpu.sh status' shows it, 'tpu.sh delete' removes it"
        return 1
        ;;
    esac
    [[ "$now" == "$before" ]] || say "$NAME is not ready yet; looking every $POLL_SECONDS s." \
      "Ctrl-C ends this look, not the request ('tpu.sh delete' does)"
    before="$now"
    sleep "$POLL_SECONDS"
  done
  say "$NAME is ready, and costs until 'tpu.sh delete'"
}

setup() {
  local archive=(git -C "$ROOT" archive --format=tar.gz --output="$ARCHIVE" HEAD)
  if [[ "$DRY_RUN" == 1 ]]; then
    show "${archive[@]}"
  else
    [[ -z "$(git -C "$ROOT" status --porcelain --untracked-files=no)" ]] ||
      say "changes that are not committed stay here: the workers get the last commit"
    "${archive[@]}"
  fi
  if ((SLICES > 1)); then
    tpus queued-resources scp "$ARCHIVE" "$NAME:treepo_jax.tar.gz" --node=all --worker=all
  else
    tpus tpu-vm scp "$ARCHIVE" "$NAME:treepo_jax.tar.gz" --worker=all
  fi
  [[ "$DRY_RUN" == 1 ]] || rm -f "$ARCHIVE"
  local data
  printf -v data '%q' "$DATA"
  on_workers all "mkdir -p treepo_jax && tar -xzf treepo_jax.tar.gz -C treepo_jax &&\
 DATA=$data bash treepo_jax/tpu_scripts/worker.sh setup"
}

# Prints the command line of worker.sh on a worker.
on_worker() {
  local kept quoted
  kept="$(store)" || return
  printf -v quoted ' %q' "$@"
  printf 'RUN=%q BUCKET=%q STORE=%q ' "$RUN" "$BUCKET" "$kept"
  printf 'SYNC_SECONDS=%q STOP_SECONDS=%q GCSFUSE=%q ' "$SYNC_SECONDS" "$STOP_SECONDS" "$GCSFUSE"
  printf 'bash treepo_jax/tpu_scripts/worker.sh%s' "$quoted"
}

run() {
  local command
  command="$(on_worker start "$@")"
  on_workers all "$command"
  [[ "$DRY_RUN" == 1 ]] || say "started; 'tpu.sh watch' follows it, and it goes on without that"
}

check_flags() {
  local flag
  (($#)) || refuse "FLAGS are missing, for example --config=configs/tiny.py"
  for flag in "$@"; do
    case "$flag" in
      --workdir | --workdir=*) refuse "$flag: the workdir is the run's own, runs/RUN and" \
        "BUCKET/RUN: set RUN=... instead" ;;
    esac
  done
  store > /dev/null
}

watch() { on_workers "${1:-0}" "tail -n 100 -F $(printf 'treepo_jax/runs/.%q/log.txt' "$RUN")"; }

stop() {
  local command
  command="$(on_worker stop)"
  on_workers all "$command"
  [[ "$DRY_RUN" == 1 ]] || say "$NAME stands and costs on: 'tpu.sh delete'"
}

fetch() {
  local folder="${1:-runs/$RUN}"
  if [[ -n "$BUCKET" ]]; then
    [[ "$DRY_RUN" == 1 ]] || mkdir -p "$folder"
    cloud storage rsync --recursive --exclude='checkpoints/.*|uploaded/.*' "$BUCKET/$RUN" "$folder"
  else
    [[ ! -e "$folder" ]] || refuse "$folder exists: give another folder, 'tpu.sh fetch FOLDER'"
    [[ "$DRY_RUN" == 1 ]] || mkdir -p "$(dirname "$folder")"
    tpus tpu-vm scp "$NAME:treepo_jax/runs/$RUN" "$folder" --recurse --worker=0
  fi
}

# Deletes whatever has the name, VM or queued resource, whatever the settings say it is.
delete() {
  local group found=0
  if [[ "$DRY_RUN" == 0 && "$YES" == 0 ]]; then
    local answer=""
    read -r -p "Delete $NAME in $ZONE of $PROJECT, with its disks? Type its name: " answer || true
    [[ "$answer" == "$NAME" ]] || refuse "nothing was deleted, and $NAME costs on (--yes deletes" \
      "without a question)"
  fi
  for group in queued-resources tpu-vm; do
    local now=standing flags
    flags=(--quiet)
    if [[ "$group" == queued-resources ]]; then flags+=(--force); fi # its VMs, too
    if [[ "$DRY_RUN" == 0 ]]; then
      now="$(describe "$group" "$NAME")"
    elif { [[ "$group" == queued-resources ]] && ! queued; } ||
      { [[ "$group" == tpu-vm ]] && queued; }; then
      now=ABSENT
    fi
    [[ "$now" != ABSENT ]] || continue
    found=1
    if [[ "$now" == DELETING ]]; then
      say "$group $NAME is being deleted already"
      continue
    fi
    tpus "$group" delete "$NAME" "${flags[@]}"
  done
  ((found)) || say "no TPU VM and no queued resource $NAME in $ZONE of $PROJECT: nothing to delete"
  [[ -z "$BUCKET" ]] || say "$BUCKET/$RUN stays and costs: 'gcloud storage rm --recursive" \
    "$BUCKET/$RUN' deletes it"
}

status() {
  local group
  for group in tpu-vm queued-resources; do
    say "$group:"
    tpus "$group" list
  done
  say "disks of your own (a TPU VM's boot disk goes with it):"
  if [[ "$ZONE" == - ]]; then
    cloud compute disks list --project="$PROJECT"
  else
    cloud compute disks list --project="$PROJECT" --zones="$ZONE"
  fi
  say "buckets:"
  cloud storage buckets list --project="$PROJECT" --format="value(name)"
  if [[ -n "$BUCKET" ]]; then cloud storage du --summarize "$BUCKET"; fi
}

types() { tpus tpu-vm accelerator-types list; }

main() {
  local verb="" argument arguments
  arguments=()
  for argument in "$@"; do
    case "$argument" in
      --dry-run) DRY_RUN=1 ;;
      --yes) YES=1 ;;
      --delete) DELETE_AT_END=1 ;;
      *) if [[ -z "$verb" ]]; then verb="$argument"; else arguments+=("$argument"); fi ;;
    esac
  done
  case "$verb" in
    create | setup | stop | delete | status | types)
      ((${#arguments[@]} == 0)) || refuse "${arguments[0]}: '$verb' takes no arguments"
      ;;
    watch | fetch) ((${#arguments[@]} < 2)) || refuse "${arguments[1]}: '$verb' takes one at most" ;;
    run | resume | keep) ;;
    *)
      sed -n '2,/^set/s/^# \{0,1\}//p' "$HERE/tpu.sh"
      exit 2
      ;;
  esac
  check_settings "$verb"
  case "$verb" in
    run | resume | keep) check_flags ${arguments[@]+"${arguments[@]}"} ;;
  esac
  "$verb" ${arguments[@]+"${arguments[@]}"}
}

main "$@"
