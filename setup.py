"""Installs the `maskfeat` package: `pip install -e .` (add `[dev]` for the test tools)."""

from setuptools import find_packages, setup

# What single commands need, in packages that training does without.
EXTRAS = {
    "plots": ["matplotlib>=3.8.4"],
    "probes": ["scikit-learn>=1.4.2"],
    "slurm": ["submitit>=1.5.1"],
    "torchcodec": ["torchcodec"],
}

setup(
    name="maskfeat",
    version="0.1.0",
    description="Masked feature prediction in PyTorch: MaskFeat pre-training, fine-tuning and testing",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["maskfeat", "maskfeat.*"]),
    # Exactly what maskfeat/ imports (a test compares them); tools/test.sh --lowest installs and tests the lower bounds.
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.20",
        "safetensors>=0.4.5",
        "yacs>=0.1.8",
        "iopath>=0.1.9",
        "pyyaml>=6.0.1",
        "av>=17.1",
        "pillow>=12.3",
        "numpy>=1.26.4",
        "simplejson>=3.19.1",
        "tensorboard>=2.16.2",
    ],
    extras_require={
        **EXTRAS,
        "dev": [
            *EXTRAS["plots"],
            *EXTRAS["probes"],
            *EXTRAS["slurm"],
            "pytest>=8.3",
            "pytest-xdist>=3.6.1",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-simplejson",
        ],
    },
)
