"""Which reader fits what lies at a path or address, and by which rule it crops.

| reader | what it reads | order and resume |
|---|---|---|
| indexed | WebDataset tars with an index, in the file system or behind an address | exact |
| mds | MDS shards (mosaicml-streaming) with an index, in either place | exact, the same order rule |
| stream | tars without an index: pipes, addresses, files | by shard, to the nearest one |
| custom | what a function of the user's gives (`data.dataset`) | exact, the same order rule |

Preparing a set crops it for good (`tarflow data prepare --crop`), and the index records by which rule. Reading crops whatever
has another size than the model: originals that were only indexed, and prepared images for a model of smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.custom.code import Named
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset, open_dataset
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.stream.shards import fingerprint_of_names, stream_fingerprint, stream_shards
from tarflow.data_pipeline.storage.access import address
from tarflow.data_pipeline.storage.open_index import open_index


def choose_reader(data: DataSettings) -> str:
    """`indexed`, `stream` or `custom`; whether an index is one of MDS shards is known once it is open. Raises DataError."""
    text, reader = data.train, data.reader
    if data.dataset is not None:
        return "custom"
    if reader == "stream":
        return "stream"
    if text.startswith("pipe:"):
        if reader != "auto":
            raise DataError(
                f"{text!r} is a pipe: it can only be read from its beginning, data.reader=stream (not {reader})"
            )
        return "stream"
    names_tars = text.endswith((".tar", ".tar.gz", ".tgz")) and not Path(text).is_dir()
    if names_tars and reader == "auto" and address(text) is not None:
        return "stream"
    if names_tars:
        raise DataError(
            f"{text!r} names tars, the {reader} reader takes the folder or address with their index: run "
            f"`tarflow data index {text!r} --out FOLDER` once; data.reader=stream reads tars without an index, by shard only"
        )
    return "indexed"


def check_form(index: Index, reader: str) -> str:
    """The reader for this index, `indexed` or `mds`. Raises DataError where another one was asked for."""
    have = "mds" if index.form == "mds" else "indexed"
    if reader not in ("auto", have):
        raise DataError(
            f"the data set at {index.root} consists of {index.form} shards: data.reader={have} or auto, not {reader}"
        )
    return have


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set before it is read; the length and the classes of a stream are not.

    `former_fingerprint`: the one of version 0.1, which does not cover contents and which runs of that version hold.
    None where the index itself is of that version.
    """

    fingerprint: str
    num_samples: int | None
    num_classes: int | None
    former_fingerprint: str | None = None
    index: Index | None = None  # none of a stream, nor of a user's own data
    custom: CustomDataset | None = None

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in label order, where they are known."""
        known = self.index or self.custom
        return None if known is None else known.classes


def open_custom(data: DataSettings) -> CustomDataset:
    """The data set that `data.dataset` gives for `data.train`. Raises DataError."""
    name = data.code("dataset")
    assert name is not None
    return open_dataset(Named(name), data.train)


def open_data(data: DataSettings) -> Index | CustomDataset:
    """The index of `data.train`, or the user's own data set: what knows the number of samples. Raises DataError."""
    return open_index(data.train, data.access) if data.dataset is None else open_custom(data)


def data_facts(data: DataSettings) -> DataFacts:
    """Open the index or the user's own data set, or list the stream's shards; writes nothing. Raises DataError."""
    reader = choose_reader(data)
    if reader == "custom":
        custom = open_custom(data)
        return DataFacts(custom.fingerprint, custom.num_samples, custom.num_classes, "", custom=custom)
    if reader == "stream":
        shards = stream_shards(data.train)
        return DataFacts(stream_fingerprint(shards), None, None, fingerprint_of_names(shards))
    index = open_index(data.train, data.access)
    check_form(index, data.reader)
    former = index.fingerprint_of_places if index.knows_content else None
    return DataFacts(index.fingerprint, index.num_samples, index.num_classes, former, index)


def rule_of(settings: DataSettings, data: Index | CustomDataset | None = None, training: bool = True) -> str:
    """The rule by which images are cropped as they are read. Raises DataError where the set was prepared by another one.

    A random crop draws from what is there: it goes with any preparation. It is for training alone, and not for streams, which
    are no `data` here.
    """
    prepared = data.crop if isinstance(data, Index) else None
    asked = None if settings.crop == "random" and not training else settings.crop
    if asked and prepared and asked not in ("random", prepared):
        raise DataError(
            f"data.crop={asked}, but the images of {settings.place} were cropped by the rule {prepared} when they were "
            f"prepared: set data.crop={prepared} or leave it out, or prepare them again (`tarflow data prepare --crop {asked}`)"
        )
    if asked == "random" and data is None:
        raise DataError(
            f"data.crop=random is keyed by epoch and image, which a stream ({settings.place}) does not know: give the data an "
            "index with `tarflow data index`, or set data.crop to centre, adm or edm"
        )
    return asked or prepared or "centre"
