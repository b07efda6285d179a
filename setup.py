"""The distribution. `make setup` installs it with the `dev` extra; `pip install .` is enough to tune."""

from pathlib import Path

from setuptools import setup

setup(
    name="tinygrad-autotune",
    version="0.1.0",
    description="Faster tinygrad kernels: schedules chosen by reinforcement learning, each one verified, no kernel slower than before",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.14",
    packages=[
        "autotune",
        "autotune.measuring",
        "autotune.records",
        "autotune.search",
        "autotune.experiments",
        "agents",
        "sims",
    ],
    package_data={"autotune": ["data/*"]},
    install_requires=[
        "tinygrad==0.14.0",  # its compiler has no stable interface: autotune/compiler.py is written for this release
        "numpy>=1.26",
        "sacred==0.8.7",
        "tqdm>=4.66",
        "setuptools<81",  # sacred imports pkg_resources
    ],
    extras_require={
        "dev": [
            "gymnasium==1.4.0",
            "hypothesis==6.170.15",
            "import-linter==2.16",
            "lightgbm>=4.5",  # the ranker that `make bench` holds beside ours
            "matplotlib>=3.8",  # tools/bench_plots.py
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.5",
            "scikit-learn>=1.5",  # a control in tools/bench_sims.py
        ],
        "pytorch": ["torch>=2.4", "torchvision>=0.19"],  # to hold beside, in examples/resnet.py --pytorch
    },
)
