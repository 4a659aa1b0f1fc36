"""Open the index of a data set, in the file system or behind an address."""

from __future__ import annotations

from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.index.kinds import what_file, what_folder
from tarflow.data_pipeline.layout.walk import walk
from tarflow.data_pipeline.storage.access import Access, address
from tarflow.data_pipeline.storage.remote_index import open_remote_index
from tarflow.data_pipeline.storage.roots import Roots


def open_index(path: str | Path, access: Access | None = None) -> Index:
    """The index of the data set at `path`: the folder, or the address (`http://...`), that holds `index/`.

    `access`: how remote data are reached. Raises DataError saying what to run when there is no index, or which of the
    splits to name.
    """
    if "://" in str(path) or ":/" in str(path):
        url = address(path)
        if url is not None:
            return open_remote_index(url, access or Access())
    root = Path(path)
    if (root / "index" / "shards.parquet").is_file():
        index = Index(root)
        if index.any_remote:
            Roots(None, access.allow_roots if access else ()).check_shards(index)
        return index
    if not root.exists():
        raise DataError(
            f"there is no data set at {root}: the path does not exist (settings data.train, data.validation)"
        )
    splits = sorted(child.parent.parent.name for child in root.glob("*/index/shards.parquet"))
    if splits:
        raise DataError(f"{root} holds the splits {', '.join(splits)}: name one of them, e.g. {root / splits[0]}")
    if root.is_dir() and ((root / "index.json").is_file() or any(file.suffix == ".tar" for file in walk(root).files)):
        raise DataError(f"the shards at {root} have no index yet: run `tarflow data index {root}` once")
    what = what_folder(root) if root.is_dir() else what_file(root)
    seen = f" ({what if root.is_dir() else f'it is {what}'})" if what else ""
    raise DataError(
        f"{root} is not a data set: no index and no *.tar shards in it{seen}; `tarflow data prepare` makes one"
    )
