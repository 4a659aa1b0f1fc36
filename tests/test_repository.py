"""The files around the code say the same as the code: versions, licence, commands."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import tarflow

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, without the folder that they are found in."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found, target
    return [line.strip().removeprefix("$(BIN)/") for line in found[1].splitlines()]


def test_the_commands_before_a_commit_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == recipe("lint")
    assert "ruff format --check ." in recipe("lint")


def test_the_citation_names_this_version_and_this_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert citation["version"] == tarflow.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    paper = citation["references"][0]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert len(paper["authors"]) == 10
    assert f"## {tarflow.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_whole_and_a_classifier_never_contradicts_it() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert not [name for name in PROJECT["classifiers"] if name.startswith("License ::")]  # PEP 639: the field says it


def test_all_pages_are_in_the_navigation_and_build_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "docs")],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "NO_MKDOCS_2_WARNING": "1",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stderr.strip() == ""
    for page in ("models", "data", "training", "evaluation"):
        text = (tmp_path / f"docs/api/{page}.html").read_text()
        assert text.count("doc-heading") >= 8, page
    index = (tmp_path / "docs/index.html").read_text()
    outside = set(re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', index))
    assert outside == set(), "a page fetches nothing"


PLAIN_READ = re.compile(
    r"""(?<![\w.])open\([^)\n]*"rb"\)|\.open\("rb"\)|\.read_bytes\(\)|(?:Image|tarfile|gzip)\.open\(path\b"""
)


def test_the_product_opens_files_to_read_in_one_way_that_no_pipe_can_stop() -> None:
    """A pipe in the place of a file blocks a plain open for ever; `tarflow.files.open_to_read` refuses it."""
    assert PLAIN_READ.search('open(path, "rb")')
    assert PLAIN_READ.search("data = path.read_bytes()")
    elsewhere = [
        f"{file.relative_to(ROOT)}: {found[0]}"
        for room in ("tarflow", "trainer", "models", "data_pipeline", "cluster", "evaluation")
        for file in sorted((ROOT / room).rglob("*.py"))
        for found in PLAIN_READ.finditer(file.read_text())
        if found[0] != 'open(fd, "rb")'  # a descriptor that was checked when it was opened
    ]
    assert elsewhere == []
