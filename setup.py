"""Packaging. The ops in ``kernels/<op>`` are installed as ``a1jax.kernels.<op>``; experiments and tests are not installed."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))
README = ROOT / "README.md"

setup(
    name="a1jax",
    version=re.search(r'__version__ = "(.+?)"', (ROOT / "a1jax" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="Long-horizon agents trained in three stages, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["a1jax", "a1jax.*"]) + [f"a1jax.kernels.{op}" for op in OPS],
    package_dir={f"a1jax.kernels.{op}": f"kernels/{op}" for op in OPS},
    package_data={"a1jax": ["**/*.json", "**/*.jsonl", "**/*.jinja", "**/*.txt"]},
    install_requires=[
        "bm25s",
        "flax",
        "grain",
        "importlib_resources",  # tensorflow-datasets needs it and does not declare it
        "jax>=0.10.2",
        "jaxtyping",
        "jinja2",
        "langdetect",  # the language of an answer, as IFEval tells it
        "matplotlib",
        "ml_dtypes",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "protobuf",
        "rich",
        "scipy",
        "sentencepiece",
        "tensorboardX",
        "tensorflow-datasets",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "test": [
            "beartype",
            "hypothesis",
            "ipykernel",
            "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'",  # the TPU compiler: kernels are compiled in tests
            "nbclient",  # notebooks are run by a test
            "nbformat",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools",
            "torch==2.13.0",  # with transformers the reference of the parity tests; nothing at run time needs either
            "transformers>=5.23,<6",
            "wheel",
        ],
        "notebook": ["jupyterlab"],
    },
    entry_points={"console_scripts": ["a1jax = a1jax.main:main"]},
)
