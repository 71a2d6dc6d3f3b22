"""Reward functions as users write them, right and wrong ones, for tests of config.reward.fn."""

import time


def length(texts, golds, prompts):
  """A reward for each text: its length, less where its prompt is not the gold answer."""
  return [len(t) - (0.5 if g != p else 0.0) for t, g, p in zip(texts, golds, prompts, strict=True)]


def verdict(texts, golds, prompts):
  return [g in t for t, g in zip(texts, golds, strict=True)]


def hangs_at_bad(texts, golds, prompts):
  while "bad" in texts:
    time.sleep(0.1)
  return [1.0] * len(texts)


def raises_at_bad(texts, golds, prompts):
  if "bad" in texts:
    raise KeyError("bad")
  return [1.0] * len(texts)


def raises(texts, golds, prompts):
  raise KeyError("always")


def too_few(texts, golds, prompts):
  return [1.0] * (len(texts) - 1)


def not_a_number(texts, golds, prompts):
  return [float("nan")] * len(texts)


def nothing(texts, golds, prompts):
  return None
