"""Makes the embedded policy: tokenizer, corpus, pretraining, measured accuracy, model card.

  python experiments/pretrain_embedded.py --output=DIR

Every problem of the arithmetic task stands once in a packed row, with its solutions in all styles
as branches below the same prompt; each branch is weighted by the share of its style, which is the
expected loss of a corpus that mixes the styles in these shares. The base policy therefore skips
steps about as often as the corpus does, and a small network cannot do several operations at once:
that is what reinforcement learning has to mend. Held-out chains are never trained on.

Axes: R packed rows, L tokens of a row, B prompts, P prompt tokens, S response tokens.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, trainers

from treepo_jax import config as config_lib
from treepo_jax.model import transformer, weights
from treepo_jax.tasks import arithmetic, rewards, sources

LEVELS = (3, 4, 5)
STYLE_SHARES = {"careful": 0.32, "short": 0.40, "direct": 0.28}
VOCABULARY = 416
ROW = 256  # tokens of a packed row
PROMPT = 56  # tokens of a prompt at most
RESPONSE = 80  # tokens of a sampled answer at most
EOS, PAD = 0, 1

ARCHITECTURE = transformer.Architecture(
  family="qwen3", vocab_size=VOCABULARY, width=128, layers=4, heads=4, kv_heads=2, head_dim=32,
  hidden=384, norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, max_positions=512,
  tied=True, qkv_bias=False, output_bias=False, qk_norm=True,
)  # fmt: skip

# Digits stand alone, a word keeps its leading space and, before a number, the trailing one, and
# punctuation keeps both: `12 + 5 = 17; ` is 8 tokens.
PIECES = r"\p{N}| ?\p{L}+(?: (?=\p{N}))?| ?[^\s\p{L}\p{N}]+ ?|\s+"


def build_tokenizer(directory: Path, seed: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE on training problems and writes it as a Hugging Face tokenizer."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  split = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY,
    special_tokens=["<eos>", "<pad>"],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  rng = random.Random(seed)
  problems = [
    arithmetic.problem(seed, i, split="train", levels=arithmetic.LEVELS) for i in range(6000)
  ]
  tokenizer.train_from_iterator(
    (p.question + "\n" + arithmetic.solution(p, "short", rng) for p in problems), trainer
  )
  if tokenizer.get_vocab_size() != VOCABULARY:
    raise RuntimeError(
      f"the corpus gave {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}"
    )
  tokenizer.save(str(directory / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>",
    "clean_up_tokenization_spaces": False, "model_max_length": ARCHITECTURE.max_positions,
  }  # fmt: skip
  (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
  return tokenizer


def packed_batches(tokenizer: tokenizers.Tokenizer, seed: int, rows: int):
  """Yields batches of packed rows without end: tokens, positions, end, previous, weight [R, L]."""
  rng = random.Random(seed)
  index = 0
  waiting: list[list[tuple]] = []
  while True:
    while len(waiting) < 8 * rows:
      problem = arithmetic.problem(seed, index, split="train", levels=LEVELS)
      waiting.append(family(tokenizer, problem, rng))
      index += 1
    waiting.sort(key=len, reverse=True)
    packs: list[list[list[tuple]]] = [[] for _ in range(rows)]
    left, free = [], [ROW] * rows
    for tree in waiting:  # first fit decreasing; what does not fit waits for the next batch
      place = next((r for r in range(rows) if free[r] >= len(tree)), None)
      if place is None:
        left.append(tree)
      else:
        packs[place].append(tree)
        free[place] -= len(tree)
    # Dropping the sort order of what is left keeps short problems from waiting for ever.
    waiting = left
    rng.shuffle(waiting)
    yield collate(packs)


def family(
  tokenizer: tokenizers.Tokenizer, problem: arithmetic.Problem, rng: random.Random
) -> list[tuple]:
  """Returns a prompt with a branch a style as (token, position, end, previous, weight) rows."""
  prompt = tokenizer.encode(problem.question + "\n").ids
  branches = [
    (share, [*tokenizer.encode(arithmetic.solution(problem, style, rng)).ids, EOS])
    for style, share in STYLE_SHARES.items()
  ]
  size = len(prompt) + sum(len(branch) for _, branch in branches)
  tree = [(token, i, size, max(i - 1, 0), 0.0) for i, token in enumerate(prompt)]
  for share, branch in branches:
    first = len(tree)
    for i, token in enumerate(branch):
      previous = len(prompt) - 1 if i == 0 else first + i - 1
      tree.append((token, len(prompt) + i, first + len(branch), previous, share))
  return tree


def collate(packs: list[list[list[tuple]]]) -> dict[str, np.ndarray]:
  """Puts the trees of every row behind one another; indices become those of the row."""
  batch = np.zeros((5, len(packs), ROW))
  for r, pack in enumerate(packs):
    start = 0
    for tree in pack:
      columns = np.array(tree).T
      columns[[2, 3]] += start
      batch[:, r, start : start + len(tree)] = columns
      start += len(tree)
  names = ("tokens", "positions", "end", "previous")
  return {name: batch[i].astype(np.int32) for i, name in enumerate(names)} | {
    "weight": batch[4].astype(np.float32)
  }


def loss(params, batch, *, graph):
  """Returns the mean negative log-probability of solution tokens, in nats, by style share."""
  hidden = transformer.hidden(graph, params, batch["tokens"], batch["positions"], batch["end"])
  hidden = jnp.take_along_axis(hidden, batch["previous"][..., None], 1)
  log_prob, _ = transformer.log_probs(graph, params, hidden, batch["tokens"])
  return -(log_prob * batch["weight"]).sum() / batch["weight"].sum()


def sample(graph, params, prompts, length, key):
  """Returns answers i32[B, S] drawn at temperature 1 below prompts i32[B, P] of `length` tokens."""
  a, count = ARCHITECTURE, prompts.shape[0]
  model = nnx.merge(graph, params)
  layers = transformer.unstack(params)
  key_cache, value_cache = (
    x.swapaxes(2, 3) for x in transformer.prefill(graph, params, prompts, length)
  )
  # The last prompt token is fed as the first step, so the shared context ends before it.
  visible = (jnp.arange(prompts.shape[1])[None] < length[:, None] - 1)[:, None]
  key_cache = key_cache.swapaxes(-1, -2)
  context = transformer.Context(key=list(key_cache), value=list(value_cache), visible=visible)
  own_value = [jnp.zeros((count, a.kv_heads, 1, RESPONSE, a.head_dim))] * a.layers
  own_key = [x.swapaxes(-1, -2) for x in own_value]
  last = jnp.take_along_axis(prompts, length[:, None] - 1, 1)

  def body(carry, step):
    token, own, done = carry
    hidden, own = transformer.decode_step(
      model, layers, token, length[:, None] - 1 + step, context, own, step
    )
    token = jax.random.categorical(jax.random.fold_in(key, step), model.logits(hidden))
    token = jnp.where(done, EOS, token)
    return (token, own, done | (token == EOS)), token[:, 0]

  start = (last, (own_key, own_value), jnp.zeros((count, 1), bool))
  return jax.lax.scan(body, start, jnp.arange(RESPONSE))[1].T


def style_of(problem: arithmetic.Problem, answer: str) -> str:
  """Returns which style an answer is written in, right or wrong."""
  steps = answer.count(" = ")
  return "direct" if steps == 0 else "careful" if steps >= problem.level else "short"


def evaluate(graph, params, tokenizer, *, count: int) -> dict[str, dict[str, float]]:
  """Measures accuracy on held-out problems at temperature 1, by level and by style."""
  draw = jax.jit(sample, static_argnums=0)
  problems = [
    arithmetic.problem(sources.HELDOUT_SEED, i, split="heldout", levels=LEVELS)
    for i in range(count)
  ]
  size = 100
  answers: list[str] = []
  lengths: list[int] = []
  for first in range(0, count, size):
    chunk = [tokenizer.encode(p.question + "\n").ids for p in problems[first : first + size]]
    tokens = np.full((size, PROMPT), PAD, np.int32)
    for row, prompt in zip(tokens, chunk, strict=False):
      row[: len(prompt)] = prompt
    length = np.array([len(p) for p in chunk] + [1] * (size - len(chunk)), np.int32)
    drawn = np.asarray(draw(graph, params, tokens, length, jax.random.key(first)))
    for row in drawn[: len(chunk)]:
      ended = np.flatnonzero(row == EOS)
      lengths.append(int(ended[0]) + 1 if len(ended) else RESPONSE)
      answers.append(tokenizer.decode(row[: lengths[-1]].tolist()))
  golds, graders = [p.answer for p in problems], ["number"] * len(problems)
  right = rewards.grade(answers, golds, graders, config=config_lib.default()).correct
  levels = [f"{p.level} operations" for p in problems]
  styles = [style_of(p, a) for p, a in zip(problems, answers, strict=True)]
  table = {}
  for labels in (["all"] * count, levels, styles):
    for label in sorted(set(labels)):
      chosen = np.array(labels) == label
      table[label] = {
        "share": float(chosen.mean()),
        "accuracy": float(right[chosen].mean()),
        "error": float(right[chosen].std() / chosen.sum() ** 0.5),
        "tokens": float(np.array(lengths)[chosen].mean()),
      }
  return table


def train(tokenizer: tokenizers.Tokenizer, options: argparse.Namespace):
  """Pretrains with progress and ETA; returns graph, params and the figures for the card."""
  graph, params = transformer.create(ARCHITECTURE, jax.random.key(options.seed))
  rate = optax.warmup_cosine_decay_schedule(
    0.0, options.learning_rate, options.steps // 20, options.steps, 0.02 * options.learning_rate
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01)
  )
  moments = optimizer.init(params)

  @jax.jit(static_argnames="graph", donate_argnums=(0, 1))
  def step(params, moments, batch, *, graph):
    value, gradient = jax.value_and_grad(loss)(params, batch, graph=graph)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value

  batches = packed_batches(tokenizer, options.seed, options.rows)
  began, tokens, problems, losses = time.monotonic(), 0, 0, []
  for i in range(1, options.steps + 1):
    batch = next(batches)
    tokens += int((batch["end"] > 0).sum())
    problems += int(((batch["end"] > 0) & (batch["positions"] == 0)).sum())
    params, moments, value = step(params, moments, batch, graph=graph)
    losses.append(value)
    if i % 50 == 0 or i == options.steps:
      spent = time.monotonic() - began
      mean = float(np.mean(jax.device_get(losses[-50:])))
      eta = spent / i * (options.steps - i)
      print(
        f"step {i}/{options.steps}  loss {mean:.4f}  {tokens / spent:.0f} tokens/s  "
        f"{spent:.0f} s  ETA {eta:.0f} s",
        flush=True,
      )
    if i % options.eval_every == 0 and i < options.steps:
      table = evaluate(graph, params, tokenizer, count=200)
      print(
        "  " + "  ".join(f"{k} {v['accuracy']:.2f} ({v['share']:.2f})" for k, v in table.items()),
        flush=True,
      )
  figures = {"seconds": time.monotonic() - began, "tokens": tokens, "problems": problems}
  return graph, params, figures


CARD = """---
license: apache-2.0
library_name: treepo_jax
---
# The embedded policy of treepo_jax

A Qwen3 decoder of {size:,} parameters (width {a.width}, {a.layers} layers, {a.heads} heads,
{a.kv_heads} key-value heads, vocabulary {a.vocab_size}, float32) that answers multi-step arithmetic
in words and in symbols. It is small enough for reinforcement learning on a laptop, and has honest
room to improve: the corpus that it imitates mixes solutions that write every step with solutions
that skip steps. All solutions in the corpus are correct, but so small a network cannot do several
operations at once: where it skips steps, it errs.

Made by

    {command}

in {seconds:.0f} seconds of training ({tokens:,} tokens, {steps} steps), {whole:.0f} seconds in all,
on {machine}.

- Tokenizer: byte-level BPE, lossless on any UTF-8 text, every digit a token, `<eos>` and `<pad>`
  apart.
- Corpus: the training split of `treepo_jax/tasks/arithmetic.py`, seed {seed}, {levels} operations;
  {problems:,} problems, each seen once, in every style.
- Styles, as weights in the loss: {mix}.
- Held out: one chain of operations in {heldout} by its hash, in whatever words; never trained on.

Accuracy on {count} held-out problems at temperature 1, one answer each; right is what stands in the
last complete `\\boxed{{}}`. In brackets one standard error.

| answers | share | accuracy | mean tokens |
|---|---|---|---|
{rows}

Styles are read off the answers: *careful* has a step for every operation, *direct* has none,
*short* has some.
"""


def card(
  table,
  params,
  options: argparse.Namespace,
  *,
  seconds: float,
  whole: float,
  tokens: int,
  problems: int,
) -> str:
  """Returns the model card."""
  row = "| {} | {:.2f} | {:.3f} ({:.3f}) | {:.1f} |"
  return CARD.format(
    a=ARCHITECTURE,
    size=sum(x.size for x in jax.tree.leaves(params)),
    command="python experiments/pretrain_embedded.py "
    f"--steps={options.steps} --rows={options.rows} --seed={options.seed}",
    seconds=seconds,
    whole=whole,
    tokens=tokens,
    steps=options.steps,
    machine=f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} CPU cores ({platform.machine()})",
    seed=options.seed,
    levels=", ".join(map(str, LEVELS)),
    problems=problems,
    mix=", ".join(f"{style} {share:.0%}" for style, share in STYLE_SHARES.items()),
    heldout=arithmetic.HELDOUT_SHARE,
    count=options.eval_prompts,
    rows="\n".join(
      row.format(name, v["share"], v["accuracy"], v["error"], v["tokens"])
      for name, v in table.items()
    ),
  )


def main():
  parser = argparse.ArgumentParser(description="Makes the embedded policy.")
  add = parser.add_argument
  add("--output", default="treepo_jax/embedded", help="Hugging Face directory to write")
  add("--steps", type=int, default=2600, help="optimizer steps")
  add("--rows", type=int, default=8, help="packed rows a step")
  add("--learning_rate", type=float, default=3e-3, help="peak")
  add("--seed", type=int, default=2508, help="of corpus, weights, evaluation; no run's own seed")
  add("--eval_prompts", type=int, default=2000, help="held-out prompts of the final evaluation")
  add("--eval_every", type=int, default=300, help="steps between short evaluations")
  options = parser.parse_args()
  began = time.monotonic()
  output = Path(options.output)
  with tempfile.TemporaryDirectory() as folder:
    staging = Path(folder)
    tokenizer = build_tokenizer(staging, options.seed)
    ids = {"eos_token_id": EOS, "pad_token_id": PAD}
    (staging / "config.json").write_text(json.dumps(ids))
    (staging / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    graph, params, figures = train(tokenizer, options)
    weights.save(output, ARCHITECTURE, params, source=staging)
  graph, params, _ = weights.load(output, jnp.float32)  # what is measured is what was written
  table = evaluate(graph, params, tokenizer, count=options.eval_prompts)
  text = card(table, params, options, whole=time.monotonic() - began, **figures)
  (output / "README.md").write_text(text, encoding="utf-8")
  print(text)


if __name__ == "__main__":
  main()
