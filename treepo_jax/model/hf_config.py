"""The config.json of a Hugging Face directory to an Architecture and back.

Read are the files of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters); what is
written serves both.
"""

import json
from pathlib import Path
from typing import Any

from treepo_jax.config import UserError
from treepo_jax.model.known import KNOWN
from treepo_jax.model.transformer import Architecture, RopeScaling

CLASSES = {
  "qwen2": "Qwen2ForCausalLM",  # Qwen2, Qwen2.5 and what is built on them, as Qwen2.5-Math
  "qwen3": "Qwen3ForCausalLM",
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
}

# What transformers takes where config.json leaves a key out.
ASSUMED = {
  "attention_bias": False,
  "hidden_act": "silu",
  "max_window_layers": 28,
  "mlp_bias": False,
  "partial_rotary_factor": 1.0,
  "quantization_config": None,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
}

# Of these only the one value is what our decoder does.
FIXED = ("hidden_act", "mlp_bias", "quantization_config")

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def known(name: str) -> Architecture | None:
  """Returns the architecture of a published model by its hub name, without its files."""
  return parse(KNOWN[name], Path(name)) if name in KNOWN else None


def read(path: str | Path) -> Architecture:
  """Returns what config.json in the directory says; raises UserError naming the file and key."""
  folder = Path(path)
  file = folder / "config.json"
  if not folder.is_dir():
    raise UserError(f"{folder}: no such directory; a model is a Hugging Face directory on disk")
  if not file.exists():
    raise UserError(f"{file}: no such file; a model needs config.json, *.safetensors and tokenizer")
  return parse(read_json(file), file)


def parse(config: dict, file: Path) -> Architecture:
  """Returns the Architecture of a parsed config.json; refuses what the decoder does not do."""
  if "model_type" in config and config["model_type"] == "mistral":
    _refuse_mistral_window(config, file)
  config = ASSUMED | {key: value for key, value in config.items() if value is not None}
  family = _take(config, "model_type", str, file)
  if family not in CLASSES:
    raise UserError(f"{file}: model_type is {family!r}; supported are {', '.join(CLASSES)}")
  for key in FIXED:
    if config[key] != ASSUMED[key]:
      raise UserError(f"{file}: {key} is {config[key]!r}; supported is only {ASSUMED[key]!r}")
  layers = _take(config, "num_hidden_layers", int, file)
  _refuse_windows(config, layers, file)
  width = _take(config, "hidden_size", int, file)
  heads = _take(config, "num_attention_heads", int, file)
  config = {"num_key_value_heads": heads} | config
  if family != "qwen3":  # whose heads have a size of their own
    config = {"head_dim": width // heads} | config
  kv_heads = _take(config, "num_key_value_heads", int, file)
  if heads % kv_heads:
    raise UserError(
      f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
    )
  theta, scaling = _rope(config, file)
  bias = _take(config, "attention_bias", bool, file)
  return Architecture(
    family=family,
    vocab_size=_take(config, "vocab_size", int, file),
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=_take(config, "head_dim", int, file),
    hidden=_take(config, "intermediate_size", int, file),
    norm_eps=_take(config, "rms_norm_eps", float, file),
    rope_theta=theta,
    rope_scaling=scaling,
    max_positions=_take(config, "max_position_embeddings", int, file),
    tied=_take(config, "tie_word_embeddings", bool, file),
    qkv_bias=family == "qwen2" or (family != "mistral" and bias),
    output_bias=family in ("qwen3", "llama") and bias,
    qk_norm=family == "qwen3",
  )


def form(arch: Architecture, dtype: str, source: Path | None = None) -> dict:
  """Returns a config.json; the special tokens' ids are the source's, else null.

  Raises ValueError where no file of arch's family can say what arch is.
  """
  rope: dict[str, Any] = {"rope_type": "default"}
  if arch.rope_scaling is not None:
    rope = {
      "rope_type": "llama3",
      "factor": arch.rope_scaling.factor,
      "low_freq_factor": arch.rope_scaling.low_freq_factor,
      "high_freq_factor": arch.rope_scaling.high_freq_factor,
      "original_max_position_embeddings": arch.rope_scaling.original_max_positions,
    }
  config = {
    "architectures": [CLASSES[arch.family]],
    "model_type": arch.family,
    "vocab_size": arch.vocab_size,
    "hidden_size": arch.width,
    "intermediate_size": arch.hidden,
    "num_hidden_layers": arch.layers,
    "num_attention_heads": arch.heads,
    "num_key_value_heads": arch.kv_heads,
    "head_dim": arch.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": arch.max_positions,
    "rms_norm_eps": arch.norm_eps,
    "rope_theta": arch.rope_theta,
    "rope_scaling": None if arch.rope_scaling is None else rope,
    "rope_parameters": {"rope_theta": arch.rope_theta} | rope,
    "attention_bias": arch.output_bias,
    "tie_word_embeddings": arch.tied,
    "torch_dtype": dtype,
  }
  if arch.family == "mistral":
    config["sliding_window"] = None  # left out it would be 4096
  if parse(config, Path("config.json")) != arch:
    raise ValueError(f"a config.json of model_type {arch.family} cannot describe {arch}")
  found = {}
  if source is not None and (source / "config.json").exists():
    found = read_json(source / "config.json")
  # written even where null: transformers would take its family's own for a key left out
  return config | {key: found[key] if key in found else None for key in TOKEN_IDS}


def read_json(file: Path) -> dict:
  """Returns the object that a JSON file holds; raises UserError naming the file."""
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, OSError) as error:
    raise UserError(f"{file}: cannot be read as JSON: {error}; copy the file again") from error
  if not isinstance(value, dict):
    raise UserError(f"{file}: holds a {type(value).__name__}, not an object; copy the file again")
  return value


def _refuse_windows(config: dict, layers: int, file: Path) -> None:
  """Raises UserError where a layer attends to a sliding window."""
  if "layer_types" in config:
    key, sliding = "layer_types", set(config["layer_types"]) != {"full_attention"}
  else:
    key = "use_sliding_window"
    sliding = config[key] and config["max_window_layers"] < layers
  if sliding:
    raise UserError(
      f"{file}: {key} is {config[key]!r}; supported are models whose layers all attend to "
      "everything before them"
    )


def _refuse_mistral_window(config: dict, file: Path) -> None:
  """Raises UserError where Mistral's layers, all alike, attend to a window shorter than a row."""
  window = config["sliding_window"] if "sliding_window" in config else 4096
  if window is not None and window < _take(config, "max_position_embeddings", int, file):
    raise UserError(
      f"{file}: sliding_window is {window!r} (4096 where it is left out); supported are models "
      "whose layers all attend to everything before them, as Mistral's from v0.2 on"
    )


def _rope(config: dict, file: Path) -> tuple[float, RopeScaling | None]:
  """Reads rope_theta and rope_scaling, or rope_parameters."""
  keys = ("rope_scaling", "rope_parameters", "rope_theta")
  key = next(key for key in keys if key in config and config[key])
  where = f"{file}: {key}"
  rope = {k: config[k] for k in ("rope_theta", "partial_rotary_factor")}
  if key != "rope_theta":
    rope |= {k: value for k, value in _take(config, key, dict, file).items() if value is not None}
  kind = next((rope[k] for k in ("rope_type", "type") if k in rope), "default")
  if kind not in ("default", "llama3"):
    raise UserError(f"{where}: rope_type is {kind!r}; supported are default, llama3")
  if any(isinstance(value, dict) for value in rope.values()) or rope["partial_rotary_factor"] != 1:
    raise UserError(f"{where}: is {rope}; supported is one rotation of whole heads for all layers")
  theta = _take(rope, "rope_theta", float, where)
  if kind == "default":
    return theta, None
  return theta, RopeScaling(
    factor=_take(rope, "factor", float, where),
    low_freq_factor=_take(rope, "low_freq_factor", float, where),
    high_freq_factor=_take(rope, "high_freq_factor", float, where),
    original_max_positions=_take(rope, "original_max_position_embeddings", int, where),
  )


def _take(config: dict, key: str, kind: type, where: Path | str) -> Any:
  """Returns config[key] as that kind, or says what is wrong with it."""
  if key not in config:
    raise UserError(f"{where}: the key {key} is missing; copy the file from the model's origin")
  value = config[key]
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f"{where}: {key} is {value!r}; expected {kind.__name__}")
  if kind in (int, float) and not value > 0:
    raise UserError(f"{where}: {key} is {value!r}; expected more than 0")
  return kind(value)
