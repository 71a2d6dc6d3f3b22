"""A model by name: from the cache without a network, and what is said where it cannot be had."""

import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors, hf_api

from treepo_jax.config import EMBEDDED_POLICY, UserError
from treepo_jax.model import hub, weights
from treepo_jax.tasks import text as text_lib

NAME = "someone/small-policy"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
  """Returns an empty cache of the hub, which cannot be reached."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

  def refuse(self, *args, **keywords):
    raise httpx2.ConnectError("Name or service not known")

  monkeypatch.setattr(hf_api.HfApi, "repo_info", refuse)
  return tmp_path / "cache"


def keep(cache: Path) -> Path:
  """Puts the embedded policy into the cache, laid out as a download leaves it: links to blobs."""
  model = cache / "models--someone--small-policy"
  snapshot = model / "snapshots" / COMMIT
  for folder in (model / "blobs", model / "refs", snapshot):
    folder.mkdir(parents=True)
  (model / "refs" / "main").write_text(COMMIT)
  for i, file in enumerate(sorted(Path(EMBEDDED_POLICY).iterdir())):
    shutil.copyfile(file, model / "blobs" / str(i))
    (snapshot / file.name).symlink_to(model / "blobs" / str(i))
  return snapshot


def test_a_directory_goes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / NAME).mkdir(parents=True)
  assert hub.find(NAME, "") == Path(NAME)
  with pytest.raises(
    UserError, match=r"is a directory, which has no config\.model\.revision = 'v1'"
  ):
    hub.find(NAME, "v1")


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_without_a_network_the_cached_copy_is_taken(cache, revision, tmp_path):
  snapshot = keep(cache)
  folder = hub.find(NAME, revision)
  assert folder == snapshot
  _, params, arch = weights.load(folder, "float32")
  assert text_lib.load(folder).eos_ids == (0,)
  weights.save(tmp_path / "ours", arch, params, source=folder)
  for name in ("tokenizer.json", "model.safetensors"):
    assert not (tmp_path / "ours" / name).is_symlink()
    original = (Path(EMBEDDED_POLICY) / name).read_bytes()
    assert name != "tokenizer.json" or (tmp_path / "ours" / name).read_bytes() == original


def test_offline_by_the_environment(tmp_path):
  """As users set it, in a process of its own: HF_HUB_OFFLINE is read when the hub is imported."""
  keep(tmp_path / "cache")
  code = f"from treepo_jax.model import hub; print(hub.find({NAME!r}, ''))"
  environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "PATH": ""}
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
  assert done.stdout.strip().endswith(COMMIT)


def test_what_is_not_cached_is_said(cache):
  with pytest.raises(UserError) as caught:
    hub.find(NAME, "")
  for part in (f"config.model.path = '{NAME}'", "absent", "Name or service", f"hf download {NAME}"):
    assert part in str(caught.value)


def test_a_name_that_can_be_none(cache):
  for path in ("nowhere", "a/b/c", "/nowhere/at/all", "Qwen/Qwen 2.5"):
    with pytest.raises(UserError, match=r"config\.model\.path = .* no directory, nor a name"):
      hub.find(path, "")


def _response(status: int) -> httpx2.Response:
  return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (errors.GatedRepoError("x", response=_response(403)), "licence .*huggingface.co/someone"),
    (errors.RepositoryNotFoundError("x", response=_response(404)), "hub has no such model"),
    (errors.RevisionNotFoundError("x", response=_response(404)), r"config\.model\.revision = 'v2'"),
    (errors.IncompleteSnapshotError("x", "y"), "not whole.*x.*hf download"),
    (httpx2.ReadTimeout("too slow"), "cannot be fetched .*too slow.*continues the download"),
    (OSError(28, "No space left on device"), "No space left on device"),
  ],
)
def test_what_went_wrong_is_said(cache, monkeypatch, error, message):
  def fail(*args, **keywords):
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  with pytest.raises(UserError, match=message):
    hub.find(NAME, "v2")


def test_only_what_a_policy_needs_is_fetched(cache, monkeypatch):
  """Of the files that real repositories hold; Llama's and Mistral's have all weights twice."""
  held = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "model-00001-of-00002.safetensors", "tokenizer.model"),
    *("model.safetensors", "model.safetensors.index.json", "special_tokens_map.json"),
    *("chat_template.jinja", "added_tokens.json"),
  ]
  other = ["README.md", "original/consolidated.00.pth", "consolidated.safetensors", "params.json"]
  other += ["pytorch_model.bin", "onnx/model.onnx", "original/tokenizer.model", "model.gguf"]
  asked = {}
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda name, **keys: asked.update(keys) or "folder"
  )
  assert hub.find(NAME, "v2") == Path("folder")
  assert asked["revision"] == "v2"
  patterns = asked["allow_patterns"]
  chosen = huggingface_hub.utils.filter_repo_objects([*held, *other], allow_patterns=patterns)
  assert set(chosen) == set(held)
