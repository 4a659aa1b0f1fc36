"""The pages for users, and the commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, as they would be pasted."""
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


def commands(page: Path) -> list[str]:
    """Every command line of `tarflow` that a page shows: in a line of code, or in the middle of a sentence."""
    text = page.read_text()
    fenced = [line for block in blocks(page, "bash") for line in block.splitlines()]
    indented = [line.strip() for line in re.findall(r"^    (tarflow .+)$", text, re.MULTILINE)]
    inline = [" ".join(found.split()) for found in re.findall(r"`(tarflow [^`]+)`", text)]
    return [line.partition("  #")[0].strip() for line in [*fenced, *indented, *inline] if line.startswith("tarflow ")]
