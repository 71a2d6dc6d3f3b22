# shellcheck shell=bash disable=SC2034
# Settings of tpu.sh, which sources this file. A variable of the environment goes before what
# stands here: NAME=second TYPE=v6e-16 tpu_scripts/tpu.sh create

# What is rented. There is no default for the project and the zone, because they cost money.
PROJECT="${PROJECT:-}"           # id of the Google Cloud project that pays
ZONE="${ZONE:-}"                 # us-east5-a, ...: https://cloud.google.com/tpu/docs/regions-zones
NAME="${NAME:-treepo}"           # of the TPU VM or queued resource: small letters, digits, hyphens
TYPE="${TYPE:-v6e-8}"            # accelerator type of one slice: v5litepod-N, v5p-N or v6e-N
SLICES="${SLICES:-1}"            # more than 1 is multislice, always a queued resource
SPOT="${SPOT:-1}"                # 1: much cheaper, may be taken away at any time; 0: on demand
QUEUED="${QUEUED:-0}"            # 1: a queued resource, which waits for capacity, free meanwhile
VALID_FOR="${VALID_FOR:-}"       # a queued resource gives up waiting after this, for example 6h
RUNTIME="${RUNTIME:-}"           # image of the VMs; empty: the one for TYPE
CREATE_FLAGS="${CREATE_FLAGS:-}" # more flags of gcloud's create, parted by blanks: --network=...

# What runs and where its results are kept.
RUN="${RUN:-$NAME}"         # name of the run: its workdir is runs/RUN, kept as BUCKET/RUN
BUCKET="${BUCKET:-}"        # gs://BUCKET or gs://BUCKET/FOLDER; empty: only on the VM's disk
DATA="${DATA:-}"            # copied to every worker: gs://BUCKET/qwen=models/qwen, by blanks
GCSFUSE="${GCSFUSE:-3.2.0}" # version that mounts BUCKET where there are several workers

# How often and how long, in seconds.
SYNC_SECONDS="${SYNC_SECONDS:-300}" # between copies of the workdir to BUCKET: what a kill may cost
POLL_SECONDS="${POLL_SECONDS:-60}"  # between looks at the machine
STOP_SECONDS="${STOP_SECONDS:-900}" # that `stop` waits for a run to finish its step and save

DRY_RUN="${DRY_RUN:-0}" # as --dry-run
YES="${YES:-0}"         # as --yes
