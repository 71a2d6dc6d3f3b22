# shellcheck shell=bash
# What tpu.sh knows of gcloud: how it is called, what its states and its errors mean.
# Sourced by tpu.sh after settings.sh.

NO_CAPACITY=75 # exit status; EX_TEMPFAIL of sysexits.h

say() { printf 'tpu.sh: %s\n' "$*" >&2; }

# Ends with a mistake of the user.
refuse() {
  say "$*"
  exit 2
}

# Prints a command as it can be pasted into a shell.
show() {
  local word line="" quote="'"
  for word in "$@"; do
    if [[ ! "$word" =~ ^[-A-Za-z0-9_./:=@,]+$ ]]; then
      word="'${word//$quote/$quote\\$quote$quote}'"
    fi
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# Refuses settings that gcloud would refuse later, or that would not do what they say, for a verb.
check_settings() {
  [[ "$DRY_RUN" == 1 ]] || command -v gcloud > /dev/null || refuse "gcloud was not found: install" \
    "it (https://cloud.google.com/sdk/docs/install), then 'gcloud auth login'"
  [[ -n "$PROJECT" ]] || refuse "PROJECT is not set: give the id of the project that pays, in" \
    "tpu_scripts/settings.sh or as PROJECT=... before the command ('gcloud projects list')"
  [[ -n "$ZONE" ]] || refuse "ZONE is not set: give one that has $TYPE, in" \
    "tpu_scripts/settings.sh or as ZONE=... before the command" \
    "(https://cloud.google.com/tpu/docs/regions-zones)"
  [[ "$ZONE" != - || "$1" == status ]] || refuse "ZONE=-: only 'tpu.sh status' takes all zones"
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || refuse "NAME=$NAME: small letters, digits" \
    "and hyphens are allowed, a letter first"
  [[ "$RUN" =~ ^[A-Za-z0-9][-A-Za-z0-9._]*$ ]] || refuse "RUN=$RUN: letters, digits, dots," \
    "hyphens and underscores are allowed"
  [[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || refuse "SLICES=$SLICES: a whole number from 1 on is allowed"
  [[ -z "$BUCKET" || "$BUCKET" =~ ^gs://[a-z0-9][-a-z0-9._]*(/[-A-Za-z0-9._]+)*$ ]] || refuse \
    "BUCKET=$BUCKET: gs://BUCKET or gs://BUCKET/FOLDER is allowed, without a slash at the end"
  local key pair
  for pair in $DATA; do
    [[ "$pair" =~ ^gs://[^=]+=[^=/][^=]*$ ]] || refuse "DATA=$DATA: pairs gs://BUCKET/FOLDER=FOLDER" \
      "parted by blanks are allowed, the second a folder of the project on the worker"
  done
  for key in SPOT QUEUED DRY_RUN YES; do
    [[ "${!key}" =~ ^[01]$ ]] || refuse "$key=${!key}: 0 or 1 is allowed"
  done
  for key in SYNC_SECONDS POLL_SECONDS STOP_SECONDS; do
    [[ "${!key}" =~ ^[0-9]+$ ]] || refuse "$key=${!key}: a whole number of seconds is allowed"
  done
  image > /dev/null
}

queued() { [[ "$QUEUED" == 1 ]] || ((SLICES > 1)); }

# Prints the image of the VMs for TYPE (https://cloud.google.com/tpu/docs/runtimes).
image() {
  case "$TYPE" in
    v5litepod-[1-9]*) echo "${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
    v5p-[1-9]*) echo "${RUNTIME:-v2-alpha-tpuv5}" ;;
    v6e-[1-9]*) echo "${RUNTIME:-v2-alpha-tpuv6e}" ;;
    *) refuse "TYPE=$TYPE: v5litepod-N, v5p-N and v6e-N are allowed ('tpu.sh types' lists them)" ;;
  esac
}

# Whether all chips hang on one VM; v5p-N counts two cores a chip, the others chips.
one_worker() {
  [[ "$SLICES" == 1 && "$TYPE" =~ ^(v5litepod-[148]|v6e-[148]|v5p-8)$ ]]
}

# Prints how results are kept: a copy of one VM's workdir, a mounted bucket for several, or not.
store() {
  if [[ -z "$BUCKET" ]]; then
    one_worker || refuse "$TYPE x $SLICES has several workers, which need one workdir: set" \
      "BUCKET=gs://..., a bucket in the region of $ZONE"
    echo none
  elif one_worker; then
    echo copy
  else
    echo mount
  fi
}

# Runs gcloud, or prints the command. A failure ends with what can be done about it.
cloud() {
  if [[ "$DRY_RUN" == 1 ]]; then
    show gcloud "$@"
    return
  fi
  local status=0
  { gcloud "$@" 2>&1 >&3 3>&- | tee "$ERRORS" >&2; } 3>&1 || status=$?
  if ((status)); then
    explain
    ! no_capacity || return "$NO_CAPACITY"
    return 1
  fi
}

tpus() { cloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

# Says what to do about the error that gcloud left in ERRORS.
explain() {
  if grep -Eiq 'quota' "$ERRORS"; then
    say "the project's quota is too small for $TYPE (spot and on-demand have separate ones): ask" \
      "for more at https://console.cloud.google.com/iam-admin/quotas, or take a smaller TYPE"
  elif no_capacity; then
    say "no $TYPE is free in $ZONE now, and nothing was rented: try another ZONE, wait in a" \
      "queue with QUEUED=1, or let 'tpu.sh keep' try every $POLL_SECONDS seconds"
  elif grep -Eiq 'SERVICE_DISABLED|has not been used in project|API .*not enabled' "$ERRORS"; then
    say "the project has no TPU API yet: gcloud services enable tpu.googleapis.com" \
      "--project=$PROJECT"
  elif grep -Eiq 'auth login|credential|reauthenticat' "$ERRORS"; then
    say "gcloud is not logged in: gcloud auth login"
  elif grep -Eiq 'PERMISSION_DENIED|does not have permission|forbidden|403' "$ERRORS"; then
    say "your account may not do this in $PROJECT: it needs the roles TPU Admin and Service" \
      "Account User, and Storage Object Admin for a bucket; check PROJECT and ZONE, too"
  elif grep -Eiq 'accelerator ?type' "$ERRORS"; then
    say "$ZONE seems to have no $TYPE: 'tpu.sh types' lists what it has"
  elif grep -Eiq 'ssh|public key|connection' "$ERRORS"; then
    say "a worker was not reached: several workers need the key in the agent ('eval" \
      "\$(ssh-agent); ssh-add ~/.ssh/google_compute_engine'); 'tpu.sh status' shows its state"
  else
    say "gcloud failed as it says above; 'tpu.sh status' shows what stands and costs"
  fi
}

no_capacity() {
  grep -Eiq 'no more capacity|insufficient capacity|not enough (resources|capacity)|stockout' \
    "$ERRORS"
}

# Prints the state of a tpu-vm or queued-resources of a name: gcloud's word, or ABSENT.
describe() {
  local field=state found
  [[ "$1" == tpu-vm ]] || field=state.state
  if found="$(gcloud compute tpus "$1" describe "$2" --project="$PROJECT" --zone="$ZONE" \
    --format="value($field)" 2> "$ERRORS")"; then
    echo "${found:-UNKNOWN}"
  elif grep -Eq "(nodes|queuedResources)/$2['\"]? (was )?not found|NOT_FOUND.*/$2\b" "$ERRORS"; then
    echo ABSENT
  else
    cat "$ERRORS" >&2
    explain
    return 1
  fi
}

# Prints the names of the slices.
nodes() {
  local index
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((index = 0; index < SLICES; index++)); do echo "$NAME-$index"; done
  fi
}

# Prints what the machine is, in one of a few words: absent, ready, pending, gone (preempted),
# stopped, failed. A queued resource stays ACTIVE for a while after its VMs were taken away.
machine() {
  local state node word
  if ! queued; then
    state="$(describe tpu-vm "$NAME")" || return
    meaning "$state"
    return
  fi
  state="$(describe queued-resources "$NAME")" || return
  word="$(meaning "$state")"
  if [[ "$word" == ready ]]; then
    for node in $(nodes); do
      state="$(describe tpu-vm "$node")" || return
      [[ "$state" != ABSENT ]] || state=PREEMPTED
      word="$(meaning "$state")"
      [[ "$word" == ready ]] || break
    done
  fi
  echo "$word"
}

meaning() {
  case "$1" in
    READY | ACTIVE) echo ready ;;
    ABSENT) echo absent ;;
    PREEMPTED | TERMINATED | SUSPENDING | SUSPENDED | DELETING | HIDING | HIDDEN) echo gone ;;
    STOPPED | STOPPING) echo stopped ;;
    FAILED) echo failed ;;
    *) echo pending ;; # CREATING, REPAIRING, RESTARTING, WAITING_FOR_RESOURCES, PROVISIONING, ...
  esac
}

# Runs a command on worker 0 of the first slice, another one, or all of all slices.
on_workers() {
  if ((SLICES > 1)); then
    local node=0
    [[ "$1" != all ]] || node=all
    tpus queued-resources ssh "$NAME" --node="$node" --worker="$1" --command="$2"
  else
    tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"
  fi
}
