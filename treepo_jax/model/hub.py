"""Where a model is: a directory, or a name on the Hugging Face hub and its copy in the cache."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from treepo_jax.config import UserError
from treepo_jax.model import weights

# What is fetched: config, tokenizer and safetensors, and nothing in other folders or formats.
FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *weights.COMPANIONS)

NAME = re.compile(r"[\w.-]+/[\w.-]+")

# Of the HTTP library underneath, which changes its name between releases of the hub's.
HTTPError = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]


def find(path: str, revision: str) -> Path:
  """Returns the directory of a model, fetched from the hub where `path` is no directory.

  Without a network, or with HF_HUB_OFFLINE=1, the cached copy is taken.

  Args:
    path: config.model.path, a directory or a name such as Qwen/Qwen2.5-7B.
    revision: config.model.revision, a branch, tag or commit on the hub; "": its main branch.

  Raises:
    UserError: where there is neither, saying what to do.
  """
  said, folder = f"config.model.path = {path!r}", Path(path).expanduser()
  if folder.is_dir():
    if revision:
      raise UserError(
        f"{said} is a directory, which has no config.model.revision = {revision!r}: "
        "leave the revision out, or move the directory if a model of the hub is meant"
      )
    return folder
  if not NAME.fullmatch(path):
    raise UserError(
      f"{said} is no directory, nor a name on the Hugging Face hub such as Qwen/Qwen2.5-7B: "
      "give one with config.json, *.safetensors and tokenizer.json"
    )
  try:
    return Path(
      huggingface_hub.snapshot_download(path, revision=revision or None, allow_patterns=[*FILES])
    )
  except errors.GatedRepoError as error:
    raise UserError(
      f"{said}: its licence must be accepted first, at https://huggingface.co/{path}; "
      "then log in with `hf auth login` or set HF_TOKEN"
    ) from error
  except errors.RevisionNotFoundError as error:
    raise UserError(
      f"config.model.revision = {revision!r}: {path} has no such branch, tag or commit"
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(
      f"{said} is no directory, and the Hugging Face hub has no such model; for a private one log "
      "in with `hf auth login` or set HF_TOKEN"
    ) from error
  except errors.LocalEntryNotFoundError as error:
    partly = isinstance(error, errors.IncompleteSnapshotError)
    raise UserError(
      f"{said} is no directory, its copy in the cache is {'not whole' if partly else 'absent'}, "
      f"and the Hugging Face hub cannot be reached: {_reason(error)}. Run `hf download {path}` "
      "where there is a network and give that directory as config.model.path, or unset "
      "HF_HUB_OFFLINE"
    ) from error
  except (HTTPError, OSError) as error:
    raise UserError(
      f"{said} cannot be fetched from the Hugging Face hub: {error}; the same command again "
      "continues the download"
    ) from error


def _reason(error: BaseException) -> str:
  """Returns in a line what kept the hub from being reached."""
  return str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
