"""A stand-in for gcloud, and for the TPU VMs and buckets behind it, all in one folder.

It records every call in calls.jsonl. Machines are folders vms/NODE/WORKER, in which `ssh` runs its
command for real; buckets are folders below buckets/. world.json says what exists and what to do:

  tpu-vm, queued-resources: name -> states that `describe` gives in turn, the last for ever
  workers: VMs of a slice
  rules: what happens to a call whose words contain `match`, `times` times, after `skip` others and
    after a file `after` is in a bucket: `stderr` and exit status 1; with `preempt` the machine is
    taken away first

Run as `stand_in.py FOLDER gcloud ...`; `python3` and `gcsfuse` stand in for what a VM has.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def fail(text: str, status: int = 1):
  print(text, file=sys.stderr)
  sys.exit(status)


def load() -> dict:
  return json.loads((FOLDER / "world.json").read_text())


def save(world: dict) -> None:
  part = FOLDER / f".world.{os.getpid()}"
  part.write_text(json.dumps(world))
  part.replace(FOLDER / "world.json")


def gcloud(words: list[str]) -> None:
  with (FOLDER / "calls.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\n")
  world = load()
  for rule in world["rules"]:
    if rule["match"] not in " ".join(words) or rule.get("times", 1) == 0:
      continue
    if "after" in rule and not list((FOLDER / "buckets").glob(f"**/{rule['after']}")):
      continue
    if rule.get("skip", 0):
      rule["skip"] -= 1
      save(world)
      continue
    rule["times"] = rule.get("times", 1) - 1
    if rule.get("preempt"):
      preempt(world)
    save(world)
    fail(rule["stderr"])
  options = {w.split("=", 1)[0]: w.split("=", 1)[-1] for w in words if w.startswith("--")}
  plain = [w for w in words if not w.startswith("--")]
  if plain[0] == "storage":
    storage(plain[1], plain[2:], options)
  elif plain[:2] == ["compute", "tpus"]:
    tpus(world, plain[2], plain[3], plain[4:], options)


def preempt(world: dict) -> None:
  """Kills what runs on the machines, and loses their disks."""
  for pid in (FOLDER / "vms").glob("*/*/treepo_jax/runs/.*/pid"):
    os.killpg(int(pid.read_text()), signal.SIGKILL)
  time.sleep(0.1)
  shutil.rmtree(FOLDER / "vms")
  for kind, state in (("tpu-vm", "PREEMPTED"), ("queued-resources", "SUSPENDED")):
    world[kind] = {name: [state] for name in world[kind]}


def tpus(world: dict, kind: str, verb: str, names: list[str], options: dict) -> None:
  if verb in ("list", "accelerator-types"):
    print("\n".join(world[kind]))
    return
  name = names[0]
  if verb == "create":
    if name in world[kind]:
      fail(f"ERROR: ({kind}.create) ALREADY_EXISTS: Resource {name!r} already exists")
    world[kind][name] = ["READY" if kind == "tpu-vm" else "ACTIVE"]
    count = int(options.get("--node-count", 1))
    nodes = [name] if count == 1 else [f"{name}-{i}" for i in range(count)]
    for node in nodes:
      world["tpu-vm"].setdefault(node, ["READY"])
      for worker in range(world["workers"]):
        (FOLDER / "vms" / node / str(worker)).mkdir(parents=True)
    save(world)
  elif verb in ("describe", "delete"):
    if name not in world[kind]:
      where = {"tpu-vm": "nodes", "queued-resources": "queuedResources"}[kind]
      resource = f"Resource 'projects/p/locations/z/{where}/{name}' was not found"
      fail(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) NOT_FOUND: {resource}")
    if verb == "describe":
      states = world[kind][name]
      print(states[0])
      if len(states) == 1:
        return
      states.pop(0)
    else:
      del world[kind][name]
      if kind == "queued-resources":
        world["tpu-vm"] = {n: s for n, s in world["tpu-vm"].items() if not n.startswith(name)}
      shutil.rmtree(FOLDER / "vms", ignore_errors=True)
    save(world)
  else:
    connect(world, kind, verb, names, options)


def connect(world: dict, kind: str, verb: str, names: list[str], options: dict) -> None:
  remote = next(n for n in names if ":" in n).split(":")[0] if verb == "scp" else names[0]
  nodes = sorted(n for n in world["tpu-vm"] if n == remote or n.startswith(f"{remote}-"))
  if kind == "queued-resources" and options["--node"] != "all":
    nodes = [nodes[int(options["--node"])]]
  worker = options["--worker"]
  workers = range(world["workers"]) if worker == "all" else [int(worker)]
  status = 0
  for home in (FOLDER / "vms" / node / str(w) for node in nodes for w in workers):
    if verb == "scp" and ":" in names[1]:
      shutil.copy(names[0], home / names[1].split(":")[1])
    elif verb == "scp":
      shutil.copytree(home / names[0].split(":")[1], names[1])
    else:
      path = f"{FOLDER / 'vm_bin'}{os.pathsep}{os.environ['PATH']}"
      status |= subprocess.run(
        ["bash", "-c", options["--command"]],
        cwd=home,
        env={"PATH": path, "HOME": str(home)},
        stdin=subprocess.DEVNULL,
      ).returncode
  sys.exit(status)


def local(url: str) -> Path:
  return FOLDER / "buckets" / url[5:] if url.startswith("gs://") else Path(url)


def storage(verb: str, names: list[str], options: dict) -> None:
  source = local(names[0]) if names else FOLDER / "buckets"
  if verb == "ls":
    if not source.exists() or not any(source.iterdir()):
      fail("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
    for path in sorted(source.iterdir()):
      print(f"{names[0]}{path.name}" + ("/" if path.is_dir() else ""))
  elif verb == "rsync":
    target, pattern = local(names[1]), options.get("--exclude", "$^")
    if not source.is_dir():
      fail(f"ERROR: (gcloud.storage.rsync) Did not find existing container at: {names[0]}")
    if not names[1].startswith("gs://") and not target.is_dir():
      fail(f"ERROR: (gcloud.storage.rsync) no such folder: {target}")
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
      relative = path.relative_to(source)
      if not re.match(pattern, str(relative)):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / relative)
  elif verb == "cp":
    local(names[1]).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, local(names[1]))
  elif verb == "rm":
    shutil.rmtree(source) if "--recursive" in options else source.unlink()


def python3(words: list[str]) -> None:
  """A VM's Python: makes an environment whose `treepo_jax.main` is `train`."""
  if words[:2] == ["-m", "venv"]:
    interpreter = Path(words[2]) / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    call = f'"{sys.executable}" -IS "{__file__}" "{FOLDER}" main'
    interpreter.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
    interpreter.chmod(0o755)


def main(words: list[str]) -> None:
  if words[:2] == ["-m", "treepo_jax.main"]:
    train(words[2:])


def train(flags: list[str]) -> None:
  """Takes --steps steps of 0.2 seconds, each with a line of metrics and a checkpoint, two kept."""
  print("FLAGS", json.dumps(flags), flush=True)
  values = {f.split("=", 1)[0]: f.split("=", 1)[-1] for f in flags}
  workdir = Path(values["--workdir"])
  (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
  if "--fail" in values:
    sys.exit(int(values["--fail"]))
  asked = []
  signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
  start = max((int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")), default=0)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()[:start] if start else []
  for step in range(start, int(values.get("--steps", 5))):
    time.sleep(0.2)
    lines.append(json.dumps({"step": step, "began": start}))
    part = workdir / "checkpoints" / f"{step + 1}.part"
    part.mkdir(exist_ok=True)
    (part / "state").write_text(str(step + 1))
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    part.rename(part.with_suffix(""))
    shutil.rmtree(workdir / "checkpoints" / str(step - 1), ignore_errors=True)
    if asked:
      sys.exit(128 + signal.SIGTERM)


def gcsfuse(words: list[str]) -> None:
  bucket, mount = words[-2], Path(words[-1])
  mount.rmdir()
  mount.symlink_to(FOLDER / "buckets" / bucket)


if __name__ == "__main__":
  COMMANDS = {"gcloud": gcloud, "python3": python3, "main": main, "gcsfuse": gcsfuse}
  COMMANDS[sys.argv[2]](sys.argv[3:])
