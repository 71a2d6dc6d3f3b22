"""What a config.json of either version says, and everything in it that is refused."""

import dataclasses
import json

import pytest

from treepo_jax.config import UserError
from treepo_jax.model import hf_config
from treepo_jax.model.transformer import RopeScaling

QWEN2 = {  # as Qwen2.5-1.5B has it
  "architectures": ["Qwen2ForCausalLM"],
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151643,
  "hidden_act": "silu",
  "hidden_size": 1536,
  "initializer_range": 0.02,
  "intermediate_size": 8960,
  "max_position_embeddings": 131072,
  "max_window_layers": 28,
  "model_type": "qwen2",
  "num_attention_heads": 12,
  "num_hidden_layers": 28,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 131072,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "use_cache": True,
  "use_mrope": False,
  "use_sliding_window": False,
  "vocab_size": 151936,
}
LLAMA = {  # as Llama-3.2-1B has it
  "model_type": "llama",
  "attention_bias": False,
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "num_attention_heads": 32,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "vocab_size": 128256,
}
MISTRAL = {  # as Mistral-7B-v0.3 has it
  "model_type": "mistral",
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "max_position_embeddings": 32768,
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_theta": 1000000.0,
  "sliding_window": None,
  "tie_word_embeddings": False,
  "vocab_size": 32768,
}


@pytest.fixture
def read(tmp_path):
  def write_and_read(config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return hf_config.read(tmp_path)

  return write_and_read


def _without(config: dict, *keys: str) -> dict:
  return {key: value for key, value in config.items() if key not in keys}


def test_qwen2(read):
  arch = read(QWEN2)
  assert (arch.family, arch.layers, arch.heads, arch.kv_heads, arch.head_dim) == (
    "qwen2",
    28,
    12,
    2,
    128,
  )
  assert (arch.width, arch.hidden, arch.vocab_size) == (1536, 8960, 151936)
  assert (arch.norm_eps, arch.rope_theta, arch.rope_scaling) == (1e-6, 1e6, None)
  assert arch.tied and arch.qkv_bias and not arch.output_bias and not arch.qk_norm


def test_llama_of_both_versions(read):
  arch = read(LLAMA)
  assert arch.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
  assert (arch.rope_theta, arch.head_dim) == (5e5, 64)
  nested = {"rope_theta": 5e5} | LLAMA["rope_scaling"]
  assert read(_without(LLAMA, "rope_scaling", "rope_theta") | {"rope_parameters": nested}) == arch
  old = _without(nested, "rope_type") | {"type": "llama3"}  # as earlier files name it
  assert read(LLAMA | {"rope_scaling": old}) == arch


def test_qwen3_heads_have_their_own_size(read):
  qwen3 = QWEN2 | {"model_type": "qwen3", "head_dim": 64, "attention_bias": True}
  arch = read(qwen3)
  assert arch.qk_norm and arch.qkv_bias and arch.output_bias and arch.head_dim == 64
  assert not read(qwen3 | {"attention_bias": False}).qkv_bias
  with pytest.raises(UserError, match="the key head_dim is missing"):
    read(_without(qwen3, "head_dim"))


def test_keys_left_out_are_what_transformers_takes(read):
  optional = ("rope_scaling", "rope_theta", "head_dim", "num_key_value_heads", "hidden_act")
  arch = read(_without(LLAMA, *optional, "attention_bias", "mlp_bias", "tie_word_embeddings"))
  assert (arch.rope_theta, arch.rope_scaling, arch.head_dim) == (1e4, None, 64)
  assert arch.kv_heads == 32 and not arch.tied and not arch.qkv_bias
  assert read(LLAMA | {"num_key_value_heads": None, "head_dim": None}).kv_heads == 32


def test_windows_that_no_layer_uses_are_accepted(read):
  used = QWEN2 | {"use_sliding_window": True}
  assert read(used) == read(QWEN2)  # max_window_layers 28 of 28: only later layers would
  assert read(used | {"layer_types": ["full_attention"] * 28}) == read(QWEN2)
  with pytest.raises(UserError, match="use_sliding_window is True"):
    read(used | {"max_window_layers": 21})
  with pytest.raises(UserError, match="layer_types is"):
    read(QWEN2 | {"layer_types": ["full_attention", "sliding_attention"] * 14})


def test_mistral_with_a_window_is_refused(read):
  arch = read(MISTRAL)
  assert (arch.head_dim, arch.kv_heads, arch.qkv_bias, arch.output_bias) == (128, 8, False, False)
  for keys in ({"sliding_window": 4096}, {}):  # left out it is 4096, as in v0.1
    with pytest.raises(UserError, match="sliding_window is 4096"):
      read(_without(MISTRAL, "sliding_window") | keys)
  assert read(MISTRAL | {"sliding_window": 32768}) == arch  # no row is longer
  formed = hf_config.form(arch, "bfloat16")
  assert "sliding_window" in formed and formed["sliding_window"] is None
  assert read(formed) == arch


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are qwen2, qwen3, llama, mistral"),
    ({"mlp_bias": True}, "mlp_bias is True; supported is only False"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is only 'silu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"hidden_size": "big"}, "hidden_size is 'big'; expected int"),
    ({"hidden_size": 0}, "hidden_size is 0; expected more than 0"),
    ({"vocab_size": True}, "vocab_size is True; expected int"),
    ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected bool"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling: rope_type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: rope_type is 'linear'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: the key factor is missing"),
    ({"rope_scaling": [1]}, "rope_scaling is \\[1\\]; expected dict"),
    ({"rope_scaling": {"full_attention": {"rope_theta": 1}}}, "supported is one rotation"),
    ({"partial_rotary_factor": 0.5}, "supported is one rotation of whole heads"),
    ({"rope_theta": -1.0, "rope_scaling": None}, "rope_theta is -1.0; expected more than 0"),
  ],
)
def test_what_the_decoder_does_not_do_is_refused(read, tmp_path, keys, message):
  with pytest.raises(UserError, match=message) as caught:
    read(LLAMA | keys)
  assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
  "key",
  [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
  ],
)
def test_missing_keys_are_named(read, key):
  with pytest.raises(UserError, match=f"the key {key} is missing"):
    read(_without(QWEN2, key))
  with pytest.raises(UserError, match=f"the key {key} is missing"):
    read(QWEN2 | {key: None})


@pytest.mark.parametrize("text", ["{", "", "[1]", "\xff"])
def test_a_file_that_is_not_an_object(tmp_path, text):
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(UserError, match="config.json: .*copy the file again"):
    hf_config.read(tmp_path)


def test_no_directory_and_no_file(tmp_path):
  with pytest.raises(UserError, match="config.json: no such file"):
    hf_config.read(tmp_path)
  with pytest.raises(UserError, match="nowhere: no such directory"):
    hf_config.read(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [QWEN2, LLAMA], ids=["qwen2", "llama"])
def test_forms_what_it_reads(read, config):
  arch = read(config)
  formed = hf_config.form(arch, "bfloat16")
  assert read(formed) == arch
  kept = set(config) & set(formed) - set(hf_config.TOKEN_IDS)
  assert {key: formed[key] for key in kept} == {key: config[key] for key in kept}


def test_form_refuses_what_no_file_can_say(read):
  with pytest.raises(ValueError, match="model_type qwen2 cannot describe"):
    hf_config.form(dataclasses.replace(read(QWEN2), qk_norm=True), "float32")
