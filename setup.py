"""Installs the `maskfeat` package: `pip install -e .` (add `[dev]` for the test tools)."""

from setuptools import find_packages, setup

DOCS = ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"]

setup(
    name="maskfeat",
    version="0.1.0",
    description="Masked feature prediction in PyTorch: MaskFeat pre-training, fine-tuning and testing",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["maskfeat", "maskfeat.*"]),
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.20",
        "fvcore",
        "yacs>=0.1.8",
        "av>=17",
        "pillow>=12.3",
        "numpy",
        "simplejson",
        "tensorboard",
    ],
    extras_require={
        "dev": ["pytest", "pytest-xdist", "ruff", "mypy", "types-PyYAML", "types-simplejson", "submitit", *DOCS],
        "docs": DOCS,
        "slurm": ["submitit"],
        "torchcodec": ["torchcodec"],
    },
)
