"""The page on the configuration: `python -m tarflow.trainer.config.page > docs/configuration.md`."""

import inspect
import json
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tarflow.models.presets import preset_names
from tarflow.trainer.config.schema import Config

HEAD = """# Configuration

One YAML file and `section.key=value` overrides. Unknown settings are refused with the nearest known name, and so is a key
that stands twice in the file; of two overrides of one setting the last counts, which is said. `--dry-run` prints what a
configuration amounts to. Every number has a lower and an upper bound, and so have products of them: beyond, the error names
setting, value and bound. This page is written by `python -m tarflow.trainer.config.page`.
"""

_NAMES = ", ".join(f"`{name}`" for name in preset_names())
PRESET = f"\n| `model.preset` | none | a published model, whose settings the others replace: {_NAMES} |"


def page() -> str:
    """One table per section: setting, default, meaning."""
    return HEAD + "".join(f"\n{part}\n" for part in _sections())


def _sections() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        rows = "\n".join(
            f"| `{name}.{key}` | {_default(value)} | {value.description or ''} |"
            for key, value in section.model_fields.items()
        )
        rows += PRESET if name == "model" else ""
        summary = inspect.cleandoc(section.__doc__ or "").splitlines()[0]
        yield f"## `{name}`\n\n{summary}\n\n| setting | default | meaning |\n|---|---|---|\n{rows}"


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{json.dumps(field.get_default(call_default_factory=True))}`"


if __name__ == "__main__":
    print(page(), end="")
