"""The pages name every preset and every shipped configuration."""

from pathlib import Path

import pytest

from tarflow.models.presets import preset_names

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
