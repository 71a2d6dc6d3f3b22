"""The scripts of tpu_scripts/ against a stand-in for gcloud: not against the cloud itself."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
SETTINGS = {"PROJECT": "p", "ZONE": "us-east5-a", "SYNC_SECONDS": "0", "POLL_SECONDS": "0"}
TOOLS = "bash cat cut date dirname env git grep mkdir mktemp rm sed sleep sort tee".split()


class Cloud:
  """A recorded cloud and a checkout of the scripts to call it with."""

  def __init__(self, folder: Path, checkout: Path):
    self.folder = folder
    (folder / "buckets" / "b").mkdir(parents=True)
    (folder / "calls.jsonl").touch()
    self.world()
    for bin, names in (("bin", ["gcloud"]), ("vm_bin", ["python3", "gcsfuse"])):
      (folder / bin).mkdir()
      for name in names:
        path = folder / bin / name
        call = f'"{sys.executable}" -IS "{STAND_IN}" "{folder}" {name}'
        path.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
        path.chmod(0o755)
    (folder / "tools").mkdir()  # what there is without gcloud
    for tool in TOOLS:
      (folder / "tools" / tool).symlink_to(shutil.which(tool) or tool)
    self.checkout = checkout

  def world(self, vms=None, queued=None, workers=1, rules=()) -> None:
    """Says what exists, NAME -> states, and what happens to calls."""
    world = {"tpu-vm": vms or {}, "queued-resources": queued or {}}
    world |= {"workers": workers, "rules": list(rules)}
    (self.folder / "world.json").write_text(json.dumps(world))

  def run(self, *words: str, status=0, typed="", gcloud=True, **settings: str) -> str:
    """Runs tpu.sh; returns stdout and stderr."""
    path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    path = path if gcloud else str(self.folder / "tools")
    done = subprocess.run(
      [self.checkout / "tpu_scripts" / "tpu.sh", *words],
      env={"PATH": path, "TMPDIR": str(self.folder), **SETTINGS, **settings},
      cwd=self.folder,
      input=typed,
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr

  def plan(self, *words: str, **settings: Any) -> list[list[str]]:
    """Returns the gcloud calls that --dry-run prints."""
    lines = self.run("--dry-run", *words, **settings).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("gcloud ")]

  def calls(self, *starts: str) -> list[list[str]]:
    """Returns the calls made so far that begin so."""
    lines = (self.folder / "calls.jsonl").read_text().splitlines()
    return [c for c in map(json.loads, lines) if tuple(c[: len(starts)]) == starts]

  def vm(self, node="treepo", worker=0) -> Path:
    return self.folder / "vms" / node / str(worker) / "treepo_jax"

  def metrics(self, run="treepo") -> list[dict]:
    """Returns what a run's metrics in the bucket are by now."""
    path = self.folder / "buckets" / "b" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A commit of the scripts as they are now, at a path with a blank."""
  folder = tmp_path_factory.mktemp("a checkout")
  shutil.copytree(ROOT / "tpu_scripts", folder / "tpu_scripts")
  git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
  for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "scripts"]):
    subprocess.run([*git, *words], check=True)
  return folder


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
  made = Cloud(tmp_path, checkout)
  yield made
  for pid in (tmp_path / "vms").glob("*/*/treepo_jax/runs/.*/pid"):
    try:
      os.killpg(int(pid.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      continue


def wait(condition) -> None:
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.1)


WHERE = ["--project=p", "--zone=us-east5-a"]
ON_DEMAND = {"SPOT": "0", "TYPE": "v5litepod-8"}
SLICES: dict[str, Any] = {
  "SLICES": "2",
  "TYPE": "v5litepod-16",
  "VALID_FOR": "6h",
  "BUCKET": "gs://b",
}


def test_shellcheck_finds_nothing():
  program = Path(sys.executable).with_name("shellcheck")
  scripts = sorted(map(str, (ROOT / "tpu_scripts").glob("*.sh")))
  done = subprocess.run([program, "-x", *scripts], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "settings, words",
  [
    (
      ON_DEMAND,
      "tpu-vm create treepo --version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-8",
    ),
    (
      {"NAME": "x", "TYPE": "v5p-32", "CREATE_FLAGS": "--network=n --internal-ips"},
      "tpu-vm create x --version=v2-alpha-tpuv5 --accelerator-type=v5p-32 --spot --network=n "
      "--internal-ips",
    ),
    (
      {"QUEUED": "1"},
      "queued-resources create treepo --runtime-version=v2-alpha-tpuv6e --accelerator-type=v6e-8 "
      "--spot --node-id=treepo",
    ),
    (
      SLICES,
      "queued-resources create treepo --runtime-version=v2-alpha-tpuv5-lite "
      "--accelerator-type=v5litepod-16 --spot --valid-until-duration=6h --node-count=2 "
      "--node-prefix=treepo",
    ),
  ],
)
def test_create_asks_for_what_the_settings_say(cloud: Cloud, settings, words):
  call = ["compute", "tpus", *words.split(), *WHERE]
  assert cloud.plan("create", **settings) == [call]
  assert not cloud.calls()
  cloud.run("create", **settings)
  assert [c for c in cloud.calls() if "create" in c] == [call]
  assert "nothing was created" in cloud.run("create", **settings)
  assert len([c for c in cloud.calls() if "create" in c]) == 1


@pytest.mark.parametrize("settings", [{"BUCKET": "gs://b/f"}, SLICES])
def test_dry_run_prints_what_a_run_calls(cloud: Cloud, settings):
  cloud.world(workers=2)
  flags = ["--config=c", "--steps=1", '--config.data.path=it\'s "my" $HOME;.jsonl']
  verbs = [["create"], ["setup"], ["run", *flags], ["fetch"], ["--yes", "delete"]]
  results = cloud.folder / "buckets" / settings["BUCKET"][5:] / "treepo" / "logs"
  planned = [call for verb in verbs for call in cloud.plan(*verb, **settings)]
  assert cloud.run("--dry-run", *verbs[0], gcloud=False, **settings)  # needs no gcloud
  for verb in verbs:
    cloud.run(*verb, **settings)
    if verb[0] == "run":
      wait(results.exists)
  # A worker calls gcloud, too, for its data and results.
  reads = ("describe", "cp", "ls")
  made = [c for c in cloud.calls() if not set(reads) & set(c) and not c[-1].startswith("gs://")]
  assert planned == made


@pytest.mark.parametrize(
  "settings, verb, words",
  [
    ({"PROJECT": ""}, "create", ("PROJECT is not set", "gcloud projects list")),
    ({"ZONE": ""}, "create", ("ZONE is not set", "docs/regions-zones")),
    ({"ZONE": "-"}, "create", ("ZONE=-", "status")),
    ({"NAME": "A b"}, "create", ("NAME=A b", "small letters")),
    ({"TYPE": "v6-8"}, "create", ("TYPE=v6-8", "v6e-N")),
    ({"SLICES": "0"}, "create", ("SLICES=0",)),
    ({"SPOT": "yes"}, "create", ("SPOT=yes", "0 or 1")),
    ({"BUCKET": "b"}, "create", ("BUCKET=b", "gs://BUCKET")),
    ({"DATA": "gs://b/x"}, "setup", ("DATA=gs://b/x", "FOLDER")),
    ({"TYPE": "v6e-16"}, "run --config=c", ("several workers", "BUCKET=gs://")),
    ({}, "run", ("FLAGS are missing",)),
    ({}, "run --config=c --workdir=w", ("--workdir=w", "RUN=")),
    ({}, "keep --config=c", ("BUCKET=gs://", "lost")),
    ({}, "create now", ("now", "takes no arguments")),
    ({}, "crate", ("tpu.sh create",)),
  ],
)
def test_mistakes_are_named_before_anything_is_called(cloud: Cloud, settings, verb, words):
  text = cloud.run(*verb.split(), status=2, **settings)
  assert all(word in text for word in words)
  assert not cloud.calls()


def test_missing_gcloud_is_named(cloud: Cloud):
  assert "cloud.google.com/sdk" in cloud.run("create", status=2, gcloud=False)


@pytest.mark.parametrize(
  "stderr, status, words",
  [
    ('There is no more capacity in the zone "us-east5-a"', 75, ("QUEUED=1", "another ZONE")),
    ("RESOURCE_EXHAUSTED: Quota limit 'TPUV6E' has been exceeded.", 1, ("quotas",)),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", 1, ("TPU Admin",)),
    ("SERVICE_DISABLED: Cloud TPU API has not been used in project", 1, ("services enable",)),
    ("Please run: $ gcloud auth login", 1, ("not logged in",)),
    ("INVALID_ARGUMENT: Accelerator type v6e-8 is not available", 1, ("tpu.sh types",)),
    ("something else", 1, ("something else", "tpu.sh status")),
  ],
)
def test_failures_of_create_say_what_to_do(cloud: Cloud, stderr, status, words):
  cloud.world(rules=[{"match": "create", "stderr": f"ERROR: {stderr}"}])
  text = cloud.run("create", status=status)
  assert all(word in text for word in (stderr, *words))


def test_create_waits_for_a_queued_resource(cloud: Cloud):
  states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
  cloud.world(vms={"treepo": ["READY"]}, queued={"treepo": states})
  text = cloud.run("create", QUEUED="1")
  assert text.count("not ready yet") == 1 and "costs until" in text
  cloud.world(queued={"treepo": ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "FAILED"]})
  assert "is failed" in cloud.run("create", status=1, QUEUED="1")
  assert "has failed" in cloud.run("create", status=2, QUEUED="1")
  # A queued resource stays ACTIVE for a while after its VM was taken away.
  cloud.world(vms={"treepo": ["PREEMPTED"]}, queued={"treepo": ["ACTIVE"]})
  assert "was preempted" in cloud.run("create", status=2, QUEUED="1")


def test_delete_asks_and_finds_what_stands(cloud: Cloud):
  cloud.world(vms={"treepo": ["READY"]})
  for answer in ("", "y\n", "treepo-2\n"):
    assert "nothing was deleted" in cloud.run("delete", status=2, typed=answer)
  assert not cloud.calls()
  cloud.run("delete", typed="treepo\n")
  deleted = ["compute", "tpus", "tpu-vm", "delete", "treepo", "--quiet", *WHERE]
  assert [c for c in cloud.calls() if "delete" in c] == [deleted]
  assert "nothing to delete" in cloud.run("delete", "--yes", BUCKET="gs://b")

  # Whatever the settings say it is: a queued resource goes with its VMs.
  cloud.world(vms={"treepo": ["READY"]}, queued={"treepo": ["ACTIVE"]})
  assert "gs://b/treepo stays" in cloud.run("delete", "--yes", BUCKET="gs://b")
  assert ["--quiet", "--force"] == cloud.calls("compute", "tpus", "queued-resources", "delete")[0][
    5:7
  ]
  assert len([c for c in cloud.calls() if "delete" in c]) == 2

  # What cannot be read is not taken for gone.
  rule = {"match": "describe", "stderr": "ERROR: PERMISSION_DENIED: Location not found"}
  cloud.world(vms={"treepo": ["READY"]}, rules=[rule])
  assert "TPU Admin" in cloud.run("delete", "--yes", status=1)


def test_status_shows_everything_that_costs(cloud: Cloud):
  cloud.world(vms={"one": ["READY"]}, queued={"two": ["ACTIVE"]})
  text = cloud.run("status", ZONE="-", BUCKET="gs://b")
  assert "one" in text and "two" in text
  kinds = [["compute", "tpus", "tpu-vm"], ["compute", "tpus", "queued-resources"]]
  kinds += [["compute", "disks", "list"], ["storage", "buckets", "list"]]
  assert [c[:3] for c in cloud.calls()][:4] == kinds
  assert "--zone=-" in cloud.calls()[0]


def test_flags_reach_every_worker_as_they_were_typed(cloud: Cloud):
  cloud.world(workers=2)
  settings: dict[str, Any] = SLICES | {"BUCKET": "gs://b/folder"}
  flags = ["--config=configs/tiny.py", '--text=it\'s "my" $HOME; a  b\n*', "--steps=1"]
  for verb in (["create"], ["setup"], ["run", *flags]):
    cloud.run(*verb, **settings)
  for node in ("treepo-0", "treepo-1"):
    for worker in (0, 1):
      log = cloud.vm(node, worker) / "runs" / ".treepo" / "log.txt"
      wait(lambda log=log: log.exists() and "FLAGS" in log.read_text())
      line = next(x for x in log.read_text().splitlines() if x.startswith("FLAGS"))
      # Several workers are one run and write one workdir, in the mounted bucket.
      added = ["--coordinator=auto", "--workdir=runs/.bucket/folder/treepo"]
      assert json.loads(line[6:]) == [*flags, *added]
  wait(lambda: (cloud.folder / "buckets" / "b" / "folder" / "treepo" / "metrics.jsonl").exists())


def test_keep_goes_on_after_preemptions_and_deletes_at_the_end(cloud: Cloud):
  capacity = "ERROR: There is no more capacity in the zone"
  rules = [
    {"match": "tpu-vm create", "skip": 1, "stderr": capacity},
    {
      "match": "worker.sh state",
      "after": "uploaded/[0-9]*",
      "preempt": True,
      "stderr": "ERROR: ssh",
    },
  ]
  cloud.world(rules=rules)
  text = cloud.run("keep", "--delete", "--config=c", "--steps=30", BUCKET="gs://b")
  assert "is gone: it is deleted and made anew" in text and "trying again" in text
  assert "the run is over: done" in text
  assert [m["step"] for m in cloud.metrics()] == list(range(30))
  assert 0 < cloud.metrics()[-1]["began"] < 30  # the second machine continued the first one's steps
  kept = cloud.folder / "buckets" / "b" / "treepo"
  left = [{p.name for p in (kept / part).iterdir()} for part in ("checkpoints", "uploaded")]
  assert left[0] == left[1] and "30" in left[0] <= {"29", "30"}
  assert not json.loads((cloud.folder / "world.json").read_text())["tpu-vm"]

  cloud.run("fetch", "here", BUCKET="gs://b")
  found = sorted(p.name for p in (cloud.folder / "here").iterdir())
  assert found == ["logs", "metrics.jsonl"]


def test_a_run_that_is_stopped_is_saved_and_goes_on(cloud: Cloud):
  flags = ["--config=c", "--steps=8"]
  settings: dict[str, Any] = {"BUCKET": "gs://b", "SYNC_SECONDS": "600"}
  for verb in (["create"], ["setup"], ["run", *flags]):
    cloud.run(*verb, **settings)
  wait(lambda: (cloud.vm() / "runs" / "treepo" / "checkpoints" / "2").exists())
  assert "runs already" in cloud.run("run", *flags, **settings)
  assert "treepo run: stopped" in cloud.run("stop", **settings)
  steps = len(cloud.metrics())
  assert 2 <= steps < 8
  cloud.run("resume", *flags, **settings)
  wait(lambda: len(cloud.metrics()) == 8)
  assert cloud.metrics()[-1]["began"] == steps


@pytest.mark.parametrize(
  "said, status, expected",
  [
    (["running", "running"], 0, "running"),
    (["running", "ended 0"], 0, "running"),  # workers do not end in the same second
    (["ended 0", "ended 0"], 0, "done"),
    (["ended 0", "ended 2"], 0, "failed 2"),
    (["ended 137"], 0, "failed 137"),
    (["ended 143", "running"], 0, "interrupted"),
    (["killed", "running"], 0, "interrupted"),
    (["none"], 0, "interrupted"),
    (["running"], 1, "interrupted"),  # a worker that was replaced has no script yet
    (["stopped", "ended 143"], 0, "stopped"),
    ([], 1, "unreachable"),
  ],
)
def test_progress_of_several_workers(cloud: Cloud, said, status, expected):
  script = """
    set -euo pipefail
    source "$0/keep.sh"; ERRORS="$1" STATUS="$2"; shift 2
    on_worker() { echo; }
    on_workers() { printf 'treepo run: %s\n' "$@"; return "$STATUS"; }
    progress
  """
  script = script.replace('"$@"', " ".join(map(shlex.quote, said)))
  script = script if said else script.replace("printf 'treepo run: %s\n' ;", "")
  words = ["bash", "-c", script, ROOT / "tpu_scripts", cloud.folder / "errors", str(status)]
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.stdout == f"{expected}\n", done.stderr


def test_resume_makes_a_suspended_request_anew(cloud: Cloud):
  cloud.world(vms={"treepo": ["PREEMPTED"]}, queued={"treepo": ["SUSPENDED"]})
  settings: dict[str, Any] = {"QUEUED": "1", "BUCKET": "gs://b"}
  assert "BUCKET" in cloud.run("resume", "--config=c", status=2, QUEUED="1")
  cloud.run("resume", "--config=c", "--steps=1", **settings)
  made = [c[2:5] for c in cloud.calls("compute") if c[3] in ("create", "delete")]
  kind = "queued-resources"
  assert made == [[kind, "delete", "treepo"], [kind, "create", "treepo"]]
  wait(lambda: len(cloud.metrics()) == 1)


def test_half_a_copy_is_not_restored(cloud: Cloud):
  kept = cloud.folder / "buckets" / "b" / "treepo"
  for step in ("3", "4"):
    (kept / "checkpoints" / step).mkdir(parents=True)
    (kept / "checkpoints" / step / "state").write_text(step)
  (kept / "uploaded").mkdir()
  (kept / "uploaded" / "3").touch()  # 4 was cut short
  (kept / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "began": 0}}\n' for s in range(4)))
  cloud.run("resume", "--config=c", "--steps=5", BUCKET="gs://b")
  wait(lambda: len(cloud.metrics()) == 5)
  assert cloud.metrics()[3]["began"] == 3


def test_nothing_starts_where_the_bucket_cannot_be_read(cloud: Cloud):
  rule = {"match": "storage ls", "stderr": "ERROR: HTTPError 403: no access"}
  cloud.world(rules=[rule])
  cloud.run("create")
  cloud.run("setup")
  assert "nothing was started" in cloud.run("run", "--config=c", status=1, BUCKET="gs://b")
  assert not (cloud.vm() / "runs" / ".treepo" / "log.txt").exists()


def test_a_mark_is_not_set_where_a_copy_failed(cloud: Cloud):
  rule = {"match": "storage rsync --recursive --exclude", "stderr": "ERROR: 503", "times": 100}
  cloud.world(rules=[rule])
  cloud.run("resume", "--config=c", "--steps=1", BUCKET="gs://b")
  wait(lambda: (cloud.vm() / "runs" / ".treepo" / "status").exists())
  kept = cloud.folder / "buckets" / "b" / "treepo"
  assert (kept / "checkpoints" / "1").exists() and not (kept / "uploaded").exists()
  assert "was not copied" in (cloud.vm() / "runs" / ".treepo" / "log.txt").read_text()


def test_keep_ends_with_a_run_that_fails(cloud: Cloud):
  text = cloud.run("keep", "--config=c", "--fail=2", status=1, BUCKET="gs://b")
  assert "the run is over: failed 2" in text and "costs on" in text
