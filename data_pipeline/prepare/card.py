"""Dataset cards: what makes `datasets.load_dataset(OUT)` find the shards, and leave the index beside them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SPLITS = {"": "train", "val": "validation"}  # our name -> that of `datasets`


def write_cards(folder: Path, splits: list[str], field: str, classes: list[str] | None) -> None:
    """A README.md for the set in `folder`, and one for each of its splits, which can be loaded alone.

    `splits`: the folders of the splits, or [''] for a set without. `field`: the images' field in the tars. `classes`: the
    names of the labels, None for a set without labels.
    """
    _write(folder, {split: f"{split}/*.tar" if split else "*.tar" for split in splits}, field, classes)
    for split in splits:
        if split:
            _write(folder / split, {split: "*.tar"}, field, classes)


def _write(folder: Path, shards: dict[str, str], field: str, classes: list[str] | None) -> None:
    import yaml

    # Without the features, the reader would take them from the first samples, which need not all have a label.
    features: list[dict[str, Any]] = [{"name": field, "dtype": "image"}]
    if classes:
        names = {str(label): name for label, name in enumerate(classes)}
        features.append({"name": "cls", "dtype": {"class_label": {"names": names}}})
    features += [{"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]
    files = [{"split": _SPLITS.get(split, split), "path": pattern} for split, pattern in shards.items()]
    card = {
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"config_name": "default", "features": features},
    }
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    about = "WebDataset shards made by `tarflow data prepare`. `datasets.load_dataset` reads this folder as it is."
    (folder / "README.md").write_text(f"---\n{text}---\n\n{about}\n", encoding="utf-8")
