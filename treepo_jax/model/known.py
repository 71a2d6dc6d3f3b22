"""Shapes of published models by their hub names: what a plan needs of a model that is not here.

Of each the keys of its config.json that say what the decoder is; weights are never made from them.
"""

_QWEN2_5 = {
  "model_type": "qwen2",
  "vocab_size": 151936,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
  "max_position_embeddings": 32768,
  "tie_word_embeddings": True,
}
_QWEN2_5_05B = _QWEN2_5 | {
  "hidden_size": 896,
  "num_hidden_layers": 24,
  "num_attention_heads": 14,
  "num_key_value_heads": 2,
  "intermediate_size": 4864,
}
_QWEN2_5_15B = _QWEN2_5 | {
  "hidden_size": 1536,
  "num_hidden_layers": 28,
  "num_attention_heads": 12,
  "num_key_value_heads": 2,
  "intermediate_size": 8960,
}
_QWEN2_5_7B = _QWEN2_5 | {
  "vocab_size": 152064,
  "tie_word_embeddings": False,
  "hidden_size": 3584,
  "num_hidden_layers": 28,
  "num_attention_heads": 28,
  "num_key_value_heads": 4,
  "intermediate_size": 18944,
}
_MATH = {"rope_theta": 10000.0, "max_position_embeddings": 4096}
_LONG = {"max_position_embeddings": 131072}
_QWEN3 = {
  "model_type": "qwen3",
  "vocab_size": 151936,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e6,
  "max_position_embeddings": 40960,
  "head_dim": 128,
  "num_hidden_layers": 28,
  "num_attention_heads": 16,
  "num_key_value_heads": 8,
  "tie_word_embeddings": True,
}

KNOWN = {
  "Qwen/Qwen2.5-0.5B": _QWEN2_5_05B,
  "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_5_05B,
  "Qwen/Qwen2.5-1.5B": _QWEN2_5_15B | _LONG,
  "Qwen/Qwen2.5-1.5B-Instruct": _QWEN2_5_15B,
  "Qwen/Qwen2.5-Math-1.5B": _QWEN2_5_15B | _MATH,
  "Qwen/Qwen2.5-7B": _QWEN2_5_7B | _LONG,
  "Qwen/Qwen2.5-7B-Instruct": _QWEN2_5_7B,
  "Qwen/Qwen2.5-Math-7B": _QWEN2_5_7B | _MATH,
  "Qwen/Qwen3-0.6B": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072},
  "Qwen/Qwen3-1.7B": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144},
}
