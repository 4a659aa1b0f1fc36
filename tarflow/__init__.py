"""TarFlow at scale: train, sample and evaluate TarFlow normalizing flows (arXiv 2412.06329).

The one import name of the project. Its rooms are sub-packages: `tarflow.models`, `tarflow.data_pipeline`, `tarflow.trainer`,
`tarflow.evaluation`, `tarflow.cluster`; in a checkout they are links to the folders of those names at the top. Importing
`tarflow` loads nothing heavy: public names come with their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow.models.config import TarFlowConfig as TarFlowConfig
    from tarflow.models.flow import TarFlow as TarFlow

__version__ = "0.2.0"

# public name: the module that defines it
_PUBLIC = {"TarFlow": "tarflow.models.flow", "TarFlowConfig": "tarflow.models.config"}
__all__ = ["TarFlow", "TarFlowConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tarflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
