"""TarFlow at scale: train, sample and evaluate TarFlow normalizing flows (arXiv 2412.06329).

The one import name of the project. Its rooms are sub-packages: `tarflow.models`, `tarflow.data_pipeline`, `tarflow.trainer`,
`tarflow.evaluation`, `tarflow.cluster`; in a checkout they are links to the folders of those names at the top. Importing
`tarflow` loads nothing heavy: public names come with their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow.data_pipeline.loading.loader import Loader as Loader
    from tarflow.data_pipeline.loading.settings import DataSettings as DataSettings
    from tarflow.data_pipeline.loading.shape import BatchShard as BatchShard
    from tarflow.data_pipeline.loading.shape import ImageShape as ImageShape
    from tarflow.evaluation.flow import Flow as Flow
    from tarflow.evaluation.flow import load as load
    from tarflow.models.config import TarFlowConfig as TarFlowConfig
    from tarflow.models.flow import TarFlow as TarFlow

__version__ = "0.2.0"

# public name: the module that defines it
_PUBLIC = {
    "BatchShard": "tarflow.data_pipeline.loading.shape",
    "DataSettings": "tarflow.data_pipeline.loading.settings",
    "Flow": "tarflow.evaluation.flow",
    "ImageShape": "tarflow.data_pipeline.loading.shape",
    "Loader": "tarflow.data_pipeline.loading.loader",
    "TarFlow": "tarflow.models.flow",
    "TarFlowConfig": "tarflow.models.config",
    "load": "tarflow.evaluation.flow",
}
__all__ = [
    "BatchShard", "DataSettings", "Flow", "ImageShape", "Loader", "TarFlow", "TarFlowConfig", "__version__", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tarflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
