"""Packaging. ``properties/`` and ``dataset_converters/`` are installed inside the package alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
PACKAGE = (HERE / "recbole_mllm/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "([^"]+)"', PACKAGE, re.MULTILINE)[1]
README = HERE / "README.md"


def description() -> str:
    """Return the README for a package index, where links to files of the repository lead nowhere, without them."""
    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    text = re.sub(r"<picture>.*?</picture>|!\[[^]]*\]\((?!http)[^)]*\)", "", text, flags=re.DOTALL)
    return re.sub(r"\[([^]]+)\]\((?!http)[^)]*\)", r"\1", text)


# RecBole's metadata asks for ray<=2.6.3, which has no wheel for Python 3.12 and later: there
# `pip install --no-deps recbole==1.2.1` brings it. We never import ray.
RECBOLE = ["recbole==1.2.1; python_version < '3.12'"]

# What RecBole 1.2.1 imports, but for ray; declared here for Pythons where RecBole itself cannot be
NEEDED_BY_RECBOLE = [
    "colorama==0.4.4",
    "colorlog==4.7.2",
    "plotly>=4.0.0",
    "psutil>=5.9.0",
    "scikit-learn>=0.23.2",
    "tabulate>=0.8.10",
    "tensorboard>=2.5.0",
    "texttable>=0.9.0",
    "thop>=0.1.1.post2207130030",
    "tqdm>=4.48.2",
]

setup(
    name="recbole-mllm",
    version=VERSION,
    description="MLLM-MSR for RecBole: multimodal large language models as sequential recommenders",
    long_description=description(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["recbole_mllm", "recbole_mllm.*"]),
        "recbole_mllm.properties",
        "recbole_mllm.dataset_converters",
    ],
    package_dir={
        "recbole_mllm.properties": "properties",
        "recbole_mllm.dataset_converters": "dataset_converters",
    },
    package_data={
        "recbole_mllm": [
            "demo/tiny/*",
            "benchmark/templates/*",
            "common/templates/*",
            "inspect/templates/*",
            "plan/templates/*",
            "training/templates/*",
            "py.typed",
        ],
        "recbole_mllm.properties": ["*.yaml", "*/*.yaml"],
    },
    entry_points={"console_scripts": ["recbole-mllm = recbole_mllm.cli:main"]},
    install_requires=[  # the least versions were tried together on 1 December 2026, but for torch and pyyaml
        "accelerate>=1.6",  # fsdp_version
        "huggingface-hub>=1.31",  # resolve_revision
        "jinja2>=3.1.6",
        "numpy>=1.26",
        "pandas>=2.2",
        "peft>=0.20",
        "pillow>=10.0.1",
        "pyyaml>=6.0",
        "scipy>=1.15",
        "torch>=2.6",
        "transformers>=5.23",  # `mm_encoder_outputs` (5.18), without which images are not read; `decision`
        *NEEDED_BY_RECBOLE,
        *RECBOLE,
    ],
    extras_require={
        "test": [
            "bitsandbytes>=0.46",
            "gguf",
            "hypothesis",
            "import-linter",
            "ipykernel",
            "mypy",
            "nbclient",
            "openai>=1.98",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "sentencepiece",
            "shtab",
            "statsmodels>=0.14",
            "transformers[serving]",
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "cli": ["shtab>=1.7"],
        "gguf": ["gguf>=0.10"],
        "server": ["openai>=1.98"],
        "energy": ["codecarbon>=3"],
        "report": ["plotly>=4.0.0"],
        "qlora": ["bitsandbytes>=0.46"],
    },
)
