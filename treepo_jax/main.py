"""The command: python -m treepo_jax.main --config=configs/tiny.py --workdir=runs/tiny."""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from treepo_jax import config as config_lib

# --mode=plan, set before jax is imported: the host computes on its CPU, and libtpu looks for no
# TPU, no metadata server and no lock of another process that describes a topology at once.
NO_TPU = {
  "JAX_PLATFORMS": "cpu",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_LOG_DIR": "disabled",
}

MODES = ("train", "rollout", "evaluate", "export", "plan", "grade")
CONFIG = config_flags.DEFINE_config_file(
  "config", None, "a file of configs/; --config.KEY=VALUE overrides a key", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of everything that the run writes")
MODE = flags.DEFINE_enum("mode", "train", MODES, "what to do")
TOPOLOGY = flags.DEFINE_string("topology", None, "--mode=plan: the TPUs, like v5e:2x4, v5p:2x2x4")
INPUT = flags.DEFINE_string("input", None, "--mode=grade: a JSONL file of answers")
OUTPUT = flags.DEFINE_string(
  "output", None, "--mode=export: the Hugging Face directory to write; --mode=grade: the JSONL file"
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "of several processes: HOST:PORT of process 0, or auto (TPU pods, SLURM)"
)
PROCESSES = flags.DEFINE_integer("processes", None, "how many there are; not with auto")
PROCESS = flags.DEFINE_integer("process", None, "number of this one, from 0; not with auto")


def main(argv: list[str]) -> None:
  """Runs one mode; a mistake of the user ends with a message and exit status 2."""
  if len(argv) > 1:
    raise config_lib.UserError(f"{argv[1]!r} is no flag: flags begin with --")
  if MODE.value == "grade":
    _grade()
    return
  if CONFIG.value is None or WORKDIR.value is None:
    name = "config" if CONFIG.value is None else "workdir"
    raise config_lib.UserError(
      f"--{name} is missing, for example --config=configs/tiny.py --workdir=runs/tiny"
    )
  config, workdir = config_lib.validate(CONFIG.value), Path(WORKDIR.value)

  # A second run, or one that continues, finds its programs compiled.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "treepo_jax"))
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  if MODE.value == "plan":
    _plan(config, workdir)
    return
  from treepo_jax.model import mesh  # jax is imported here, after the flags are known to be good
  from treepo_jax.run import evaluate, hosts, train

  hosts.join(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  mesh.split_host(config, PROCESSES.value or 1)
  config = mesh.resolve(config)

  if MODE.value == "train":
    train.run(config, workdir)
  elif MODE.value == "rollout":
    train.rollout(config, workdir)
  elif MODE.value == "evaluate":
    evaluate.run(config, workdir)
  elif OUTPUT.value is None:
    raise config_lib.UserError("--mode=export needs --output=DIR, the directory to write")
  else:
    train.export(config, workdir, Path(OUTPUT.value))


def _plan(config, workdir: Path) -> None:
  """Compiles for TPUs that are not there; jax must not look for those that are."""
  if TOPOLOGY.value is None:
    raise config_lib.UserError("--mode=plan needs --topology=NAME, like v5e:2x4 or v5p:2x2x4")
  os.environ.update(NO_TPU)
  from treepo_jax.run import plan

  plan.run(config, TOPOLOGY.value, workdir)


def _grade() -> None:
  """Grades a file; the config is optional, and no workdir is written."""
  if INPUT.value is None or OUTPUT.value is None:
    name = "input" if INPUT.value is None else "output"
    raise config_lib.UserError(
      f"--mode=grade needs --{name}, for example --input=answers.jsonl --output=graded.jsonl"
    )
  config = config_lib.validate(CONFIG.value or config_lib.default())
  from treepo_jax.run import grade

  grade.run(config, Path(INPUT.value), Path(OUTPUT.value))


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; a misspelt one, a wrong value or an unknown config key is the user's mistake."""
  try:
    rest = flags.FLAGS(argv)
    if CONFIG.present:
      _ = CONFIG.value.lock  # of a file that is missing or broken any attribute raises
    return rest
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    text = str(error)
    if isinstance(error, AttributeError | KeyError):
      text = text.replace("\\n", ". ").replace("\\", "").replace("'", "")  # repr of a repr
      text = f"a --config.KEY=VALUE names a key that does not exist: {text}"
    raise config_lib.UserError(text) from error


def cli() -> None:
  """Runs the command of sys.argv."""
  logging.set_verbosity(logging.WARNING)
  try:
    app.run(main, flags_parser=_parse)
  except config_lib.UserError as error:
    print(f"treepo_jax: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  cli()
