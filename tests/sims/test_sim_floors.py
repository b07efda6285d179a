"""Simulators know arrays, no compiler: what the package may import."""

import ast
from pathlib import Path

import pytest

import sims

ALLOWED = {"tinygrad", "tinygrad.nn.state", "tinygrad.nn.optim"}


@pytest.mark.parametrize("file", sorted(Path(sims.__file__).parent.glob("*.py")), ids=lambda f: f.name)
def test_imports_run_downward(file: Path) -> None:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert not any(name.split(".")[0] in ("autotune", "examples") for name in names)
    assert {name for name in names if name.split(".")[0] == "tinygrad"} <= ALLOWED
