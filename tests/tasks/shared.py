"""Where the shared test data is, if it is."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def path(*parts: str) -> Path:
  """Returns a path below TREEPO_SHARED, or skips the test naming what is absent."""
  root = Path(os.environ.get("TREEPO_SHARED", REPOSITORY.parent / "shared"))
  found = root.joinpath(*parts)
  if not found.exists():
    pytest.skip(f"{'/'.join(parts)} is not in {root}: set TREEPO_SHARED to the folder that has it")
  return found
