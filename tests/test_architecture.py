"""The floors of the house: an import only ever runs downward. The contracts stand in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BREACHES = {  # a module that breaks a contract, and that contract
    "agents/bad_up.py": ("import sims\n", "floors"),
    "sims/bad_up.py": ("def late():\n    from autotune import kernel\n", "floors"),
    "autotune/bad_compiler.py": ("from tinygrad.codegen.opt import Opt\n", "adapter"),
    "autotune/search/bad_uop.py": ("from tinygrad.uop.ops import UOp\n", "adapter"),
    "agents/bad_compiler.py": ("import tinygrad.engine.realize\n", "adapter"),
    "sims/bad_device.py": ("from tinygrad.device import Buffer\n", "adapter"),
    "autotune/bad_sacred.py": ("import sacred\n", "sacred"),
    "sims/bad_sacred.py": ("from sacred import Experiment\n", "sacred"),
}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's verdict on the packages under `root`."""
    program = (
        "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True, verbose=False))"
    )
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, "-c", program], cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The modules of the packages, empty: what they import is what a test writes into them."""
    for package in ("autotune", "sims", "agents"):
        for module in (ROOT / package).rglob("*.py"):
            target = tmp_path / module.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return tmp_path


def test_the_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


def test_there_are_the_three_contracts():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert [c["id"] for c in contracts] == ["floors", "adapter", "sacred"]


def test_each_breach_is_noticed(copy):
    (copy / "autotune" / "compiler.py").write_text("import tinygrad.codegen\n")
    assert lint(copy).returncode == 0
    names = contract_names()
    for path, (text, _) in BREACHES.items():
        (copy / path).write_text(text)
    done = lint(copy)
    assert done.returncode == 1
    for path, (_, contract) in BREACHES.items():
        module = path.removesuffix(".py").replace("/", ".")
        assert module in done.stdout, f"{path} went unnoticed"
        assert f"{names[contract]} BROKEN" in done.stdout


def contract_names() -> dict[str, str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {c["id"]: c["name"] for c in contracts}


def test_nothing_imports_an_example_and_the_command_line_needs_no_sacred():
    for package in ("autotune", "sims", "agents"):
        for module in (ROOT / package).rglob("*.py"):
            assert "import examples" not in module.read_text() and "from examples" not in module.read_text(), module
    program = "import autotune.cli, sys; sys.exit('sacred' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
