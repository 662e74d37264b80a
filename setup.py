"""Installs the `maskfeat` package: `pip install -e .` (add `[dev]` for the test tools)."""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

# Where a frontend such as pip runs this file, it compares `python_requires` itself, and says so in one line.
FRONTENDS = ("_PYPROJECT_HOOKS_BUILD_BACKEND", "PEP517_BUILD_BACKEND")
if sys.version_info < (3, 10) and not any(name in os.environ for name in FRONTENDS):
    sys.exit("maskfeat needs Python 3.10 or newer; this is Python " + sys.version.split()[0])

ROOT = Path(__file__).resolve().parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "maskfeat" / "__init__.py").read_text(), re.M)
# What single commands need, in packages that training does without.
EXTRAS = {
    "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.6.0"],
    "plots": ["matplotlib>=3.8.4"],
    "imagenet": ["scipy>=1.13"],
    "parquet": ["pyarrow>=17.0"],
    "trackers": ["wandb>=0.31", "mlflow-skinny>=3.17", "trackio>=0.43"],
    "slurm": ["submitit>=1.5.1"],
    "simplejpeg": ["simplejpeg>=1.8.2"],
    "torchcodec": ["torchcodec"],
    "docs": ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
}

setup(
    name="maskfeat",
    version=VERSION,
    description="Masked feature prediction in PyTorch: MaskFeat and MFM pre-training, fine-tuning and testing",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The maskfeat developers",
    license="Apache-2.0",
    project_urls={
        "MaskFeat (paper)": "https://arxiv.org/abs/2112.09133",
        "MFM (paper)": "https://arxiv.org/abs/2206.07706",
    },
    keywords=["self-supervised learning", "masked image modeling", "HOG", "vision transformer", "video"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # The recipes of configs/ are data of the package: installed, they lie in maskfeat/configs/.
    packages=[*find_packages(include=["maskfeat", "maskfeat.*"]), "maskfeat.configs"],
    package_dir={"maskfeat.configs": "configs"},
    package_data={
        "maskfeat": ["py.typed"],
        "maskfeat.report": ["page.css", "page.js"],
        "maskfeat.configs": ["**/*.yaml"],
    },
    entry_points={"console_scripts": ["maskfeat = maskfeat.cli:main"]},
    # Exactly what maskfeat/ imports (a test compares them); tools/test_lowest.sh installs and tests the lower bounds.
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.20",
        "huggingface_hub>=0.34",
        "safetensors>=0.4.5",
        "yacs>=0.1.8",
        "iopath>=0.1.9",
        "pyyaml>=6.0.1",
        "av>=17.1",
        "pillow>=12.3",
        "numpy>=1.26.4",
        "simplejson>=3.19.1",
        "tensorboard>=2.16.2",
        "tqdm>=4.66.3",
    ],
    extras_require={
        **EXTRAS,
        "dev": [
            *EXTRAS["export"],
            *EXTRAS["plots"],
            *EXTRAS["imagenet"],
            *EXTRAS["parquet"],
            *EXTRAS["slurm"],
            *EXTRAS["simplejpeg"],
            *EXTRAS["docs"],
            "pytest>=8.3",
            "pytest-xdist>=3.6.1",
            "scikit-learn>=1.4.2",  # tests compare with it
            "ruff",
            "mypy",
            "ipykernel>=6.29",  # the test of the notebook
            "nbclient>=0.10",
            "setuptools>=70.1",  # the test of the wheel builds without isolation
            "types-PyYAML",
            "types-simplejson",
        ],
    },
)
