# shellcheck shell=bash
# How a run survives preemptions: the verbs resume and keep of tpu.sh, which sources this file.

# Prints how the run is, from all workers: done, running, stopped, failed N, interrupted,
# unreachable.
progress() {
  local command lines failed=0
  command="$(on_worker state)" || return
  lines="$(on_workers all "$command" 2> /dev/null)" || failed=1
  lines="$(grep -o 'treepo run: .*' <<< "$lines" | sort -u || true)"
  if [[ -z "$lines" ]]; then
    echo unreachable
  elif grep -q 'stopped' <<< "$lines"; then
    echo stopped
  elif grep -Ev 'running|ended (0|130|143)$|none|killed' <<< "$lines" > "$ERRORS"; then
    sed -n '1s/.*ended/failed/p' "$ERRORS"
  elif ((failed)) || grep -Eq 'ended 1|none|killed' <<< "$lines"; then
    echo interrupted
  elif grep -q running <<< "$lines"; then
    echo running
  else
    echo "done"
  fi
}

resume() {
  local now=absent
  [[ "$DRY_RUN" == 1 ]] || now="$(machine)"
  if [[ "$now" == ready && "$(progress)" == running ]]; then
    say "$RUN runs already: nothing was started"
    return
  fi
  if [[ "$now" == gone || "$now" == failed ]]; then
    [[ -n "$BUCKET" ]] || refuse "$NAME is $now and its disk with it; without BUCKET=gs://... there" \
      "is nothing to go on from: 'tpu.sh delete', then 'tpu.sh create'"
    say "$NAME is $now: it is deleted and made anew"
    YES=1 BUCKET="" delete
  fi
  create
  setup
  run "$@"
}

keep() {
  local now how interrupted=0
  [[ -n "$BUCKET" ]] || refuse "keep needs BUCKET=gs://...: a preempted VM's disk is lost"
  trap 'say "this look has ended, $NAME stands and costs on: tpu.sh delete"; exit 130' INT
  begin "$@"
  [[ "$DRY_RUN" == 0 ]] || return 0
  while true; do
    sleep "$POLL_SECONDS"
    now="$(machine)" || continue # gcloud has said why; the machine is looked at again
    case "$now" in
      gone | absent)
        interrupted=0
        begin "$@"
        ;;
      ready)
        how="$(progress)"
        case "$how" in
          running) interrupted=0 ;;
          # A VM that is taken away first ends its processes: it is looked at twice.
          interrupted)
            interrupted=$((interrupted + 1))
            if ((interrupted == 2)); then
              say "the run ended before its time, on a machine that stands: it goes on"
              interrupted=0
              if ((SLICES > 1)) || ! one_worker; then halt; fi
              begin "$@"
            fi
            ;;
          unreachable) say "$NAME does not answer, and costs; looking again" ;;
          *)
            finish "$how"
            return
            ;;
        esac
        ;;
      pending) ;;
      *) say "$NAME is $now; looking again every $POLL_SECONDS s" ;;
    esac
  done
}

# One resume, tried again as long as there is no capacity: nothing is rented meanwhile. It is a
# process of its own because the shell does not end at an error inside a condition.
begin() {
  local status
  while true; do
    status=0
    DRY_RUN="$DRY_RUN" YES="$YES" "$HERE/tpu.sh" resume "$@" || status=$?
    ((status == NO_CAPACITY)) || return "$status"
    say "trying again in $POLL_SECONDS s"
    sleep "$POLL_SECONDS"
  done
}

# Ends what still runs on some workers while others were begun anew: they start together.
halt() {
  local command
  command="$(on_worker stop)"
  on_workers all "$command" || true
}

finish() {
  say "the run is over: $1; results: $BUCKET/$RUN ('tpu.sh fetch')"
  if ((DELETE_AT_END)); then
    YES=1 delete
  else
    say "$NAME stands and costs on: 'tpu.sh delete'"
  fi
  [[ "$1" == "done" || "$1" == stopped ]]
}
