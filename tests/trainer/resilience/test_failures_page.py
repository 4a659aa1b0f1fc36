"""The operator's page promises nothing that no test shows."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "failures.md"


def defined() -> set[str]:
    """Names of all test functions."""
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        names |= {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
    return names


def test_every_line_of_the_failures_page_names_tests_that_exist() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line.count("|") == 5]
    rows = [line for line in rows if not line.startswith("| symptom")]
    assert len(rows) >= 25
    have = defined()
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[4])
        assert named, f"no test behind: {row[:80]}"
        assert set(named) <= have, row
    assert set(re.findall(r"`(test_\w+)`", PAGE.read_text())) <= have


def test_settings_on_the_failures_page_exist() -> None:
    from tarflow.trainer.config.schema import Config

    for section, name in re.findall(r"`(train|data|parallel|checkpoint|optim)\.([a-z_]+)\b[^`]*`", PAGE.read_text()):
        kind = Config.model_fields[section].annotation
        assert kind is not None
        assert name in kind.model_fields, f"{section}.{name}"
