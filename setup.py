"""Installs r3jax."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent


def read_requirements() -> list[str]:
  """Returns the requirements of requirements.txt without its comments."""
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
  return [line for line in stripped if line]


def read_version() -> str:
  """Returns r3jax.__version__ without importing the package."""
  return re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "r3jax" / "__init__.py").read_text(),
    re.M,
  )[1]


setuptools.setup(
  name="r3jax",
  version=read_version(),
  description="Reason-Reflect-Refine reinforcement learning of the BAGEL multimodal model in JAX",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
  # The config files lie beside the package in the repository, and in the package when installed.
  packages=[
    *setuptools.find_packages(include=["r3jax", "r3jax.*"]),
    "r3jax.configs",
  ],
  package_dir={"r3jax.configs": "configs"},
  package_data={
    "r3jax": [
      "py.typed",
      "assets/**",
      "report/*.css",
      "report/*.j2",
      "report/*.js",
    ]
  },
  entry_points={"console_scripts": ["r3jax = r3jax.cli.main:main"]},
  python_requires=">=3.11",
  install_requires=read_requirements(),
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda12": ["jax[cuda12]"],
    # Compiles for TPU topologies on a machine without one.
    "aot": ["libtpu==0.0.42"],
    "gcs": ["etils[epath-gcs]", "gcsfs"],
    "hf": ["huggingface_hub>=0.30"],  # paths that begin with hf://
    "wandb": ["wandb"],
    "torch": ["torch>=2.4"],  # Tests that exported weights are PyTorch's.
    # scipy: OWLv2's image processor
    "detector": ["torch", "transformers", "scipy"],
    "preferences": ["torch", "transformers"],
    # The weights of PP-OCR are in RapidOCR's wheel.
    "ocr": ["rapidocr>=3.10,<4", "onnxruntime>=1.20"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"],
    "test": [
      "beartype>=0.23",
      "hypothesis>=6.170",
      "ipykernel>=7.0",
      "nbclient>=0.11",
      "playwright>=1.50",
      "pyright[nodejs]>=1.1.400",
      "pytest>=9.0",
      "pytest-timeout>=2.4",
      "pytest-xdist>=3.8",
      "pyyaml",
      "ruff>=0.17,<0.18",
      "setuptools",
      "wheel",
    ],
  },
)
