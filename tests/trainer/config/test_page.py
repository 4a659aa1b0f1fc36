"""The pages name every preset and every shipped configuration."""

from pathlib import Path

import pytest

from tarflow.models.presets import preset_names
from tarflow.trainer.config.page import page, presets_table

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.case("N15")
def test_the_presets_are_in_the_page_of_settings() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| `model.preset` |")]
    assert [name for name in preset_names() if f"`{name}`" not in row] == []


@pytest.mark.case("N15")
def test_every_shipped_configuration_stands_in_a_page() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    models = [path.name for path in (ROOT / "configs").glob("*.yaml") if "model:" in path.read_text()]
    assert len(models) >= 12
    assert [name for name in models if name not in text] == []


def test_the_page_is_what_the_settings_and_the_files_make_of_it() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), "python -m tarflow.trainer.config.page"


def test_the_table_of_configurations_follows_its_files(tmp_path: Path) -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    before = presets_table(tmp_path).splitlines()
    assert len({len(line) for line in before}) == 1, "aligned"
    text = (tmp_path / "pixels512-16.yaml").read_text()
    (tmp_path / "pixels512-16.yaml").write_text(text.replace("max_images: 64_000_000", "max_images: 65_000_000"))
    after = presets_table(tmp_path).splitlines()
    changed = [new.split("`")[1] for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["pixels1024-16", "pixels256-4", "pixels512-16", "pixels512-8"], "it and what is based on it"
