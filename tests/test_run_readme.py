"""The runner of the README's blocks: which blocks it sees, and what stands before them."""

from __future__ import annotations

from pathlib import Path

import pytest
import run_readme

DOCUMENT = """
<!-- skip: takes an hour -->
```sh
make all
```

<!-- fast: echo short -->

```python
print("long")
```
Words.
```sh
false
```
```text
not run
```
"""


def test_blocks_and_their_directives():
    blocks = run_readme.parse(DOCUMENT)
    assert [(b.line, b.language, b.fast, b.skip) for b in blocks] == [
        (3, "sh", "", "takes an hour"), (9, "python", "echo short", ""), (13, "sh", "", ""),
    ]  # fmt: skip
    assert blocks[0].text == "make all\n"
    with pytest.raises(ValueError, match="never closed"):
        run_readme.parse("```sh\ntrue\n")


def test_the_first_failure_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    page = tmp_path / "page.md"
    page.write_text(DOCUMENT)
    assert run_readme.main(page) == 1
    printed = capfd.readouterr().out
    assert "skipped: takes an hour" in printed and "\nshort\n" in printed and "exit status 1" in printed
    page.write_text(DOCUMENT.replace("false", "true"))
    assert run_readme.main(page) == 0
