"""Small reference models of every family, made and saved by transformers."""

import functools

import pytest

SIZES = {
  "vocab_size": 61,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}

# Heads over key-value heads are 1, 2 and 4; qwen3's and mistral's are larger than width / heads.
CASES = {
  "qwen2_tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
  "qwen2": ("Qwen2", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
  "qwen3_tied": (
    "Qwen3",
    {
      "num_key_value_heads": 4,
      "tie_word_embeddings": True,
      "head_dim": 16,
      "attention_bias": True,
    },
  ),
  "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
  "llama_tied": (
    "Llama",
    {
      "num_key_value_heads": 1,
      "tie_word_embeddings": True,
      "rope_parameters": LLAMA3,
      "attention_bias": True,
    },
  ),
  "llama": ("Llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 500.0}}),
  "mistral": (
    "Mistral",
    {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None, "rms_norm_eps": 1e-5},
  ),
}


@pytest.fixture(scope="session", params=CASES)
def case(request) -> str:
  return request.param


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
  """Returns name -> (torch model, its directory); no weight stands at its trivial start."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")

  @functools.cache
  def make(name: str):
    family, keys = CASES[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
      **(SIZES | {"bos_token_id": None, "eos_token_id": None} | keys)
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
      for path, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in path else 0.0, 0.25)
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return model, folder

  return make
