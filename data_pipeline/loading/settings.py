"""Section `data` of a run's configuration, which is also what a loader takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.storage.access import Access, address
from tarflow.settings import MOST_SECONDS, Count, Section, at_home


def _place(value: Any) -> Any:
    """A path in its plain form; addresses and pipes as they are."""
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str) or text.startswith("pipe:"):
        return text
    return address(text) or str(Path(at_home(text)))


Place = Annotated[str, BeforeValidator(_place)]


class DataSettings(Section):
    """Where the images are and how they are read."""

    train: Place = Field(
        description="indexed shards to train on (made by `tarflow data prepare`): a folder or an address; "
        "or `pipe:` and addresses of tars without an index, as streams"
    )
    validation: Place | None = Field(None, description="indexed shards of held-out images, for bits per dimension")
    reader: Literal["auto", "indexed", "mds", "stream"] = Field(
        "auto",
        description="how data.train is read: auto goes by what lies there; stream needs no index, and promises less",
    )
    cache_dir: Annotated[str, BeforeValidator(at_home)] | None = Field(
        None, description="folder of a node's cache of remote shards; null = in the system's temporary folder"
    )
    cache_bytes: Count = Field(
        32 << 30, ge=0, le=1 << 50, description="bound of that cache; 0 = none, every sample is a request for its range"
    )
    timeout_s: float = Field(
        30.0, gt=0, le=MOST_SECONDS, description="seconds without a byte after which a remote request is given up"
    )
    retries: Count = Field(5, ge=0, le=1000, description="attempts after the first at a remote request")
    allow_roots: tuple[str, ...] = Field(
        (),
        max_length=100,
        description="addresses (s3://bucket/sets) under which shards may lie, and redirects may lead, beside the "
        "address of the index itself",
    )
    flip: bool = Field(False, description="mirror images left to right at random")
    num_workers: Count = Field(
        0, ge=0, le=1024, description="decoding processes per rank; 0 = a thread of the training process"
    )
    prefetch_batches: Count = Field(4, gt=0, le=1024, description="batches that wait ready")
    num_canonical_nodes: Count = Field(
        1, gt=0, le=1 << 20, description="parts of the data set that are read apart from each other"
    )
    shuffle_block: Count = Field(65536, gt=0, le=1 << 40, description="samples that are shuffled among each other")
    on_error: Literal["strict", "skip"] = Field(
        "strict", description="strict: a damaged image stops the run; skip: count and replace it"
    )
    max_image_pixels: Count = Field(
        MAX_PIXELS,
        gt=0,
        le=1 << 34,
        description="pixels of the largest image that is decoded; of a JPEG, at the size it is decoded at",
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of damaged images at which a run with on_error=skip stops"
    )
    accept: tuple[Literal["grey", "spare_classes", "class_names"], ...] = Field(
        (),
        description="what is meant although data and model differ: grey: colour images for a grey model; spare_classes: more "
        "classes in the model than in the data; class_names: other names than validation, checkpoint or weights have",
    )

    @classmethod
    def of(cls, train: str | Path, **settings: Any) -> DataSettings:
        """The settings of a loader that is used by itself; one that cannot be is a DataError that names it."""
        try:
            return cls(train=train, **settings)
        except ValidationError as error:
            first = error.errors()[0]
            why = first["msg"][0].lower() + first["msg"][1:]
            raise DataError(f"data.{first['loc'][0]} cannot be {first['input']!r}: {why}") from None

    @property
    def access(self) -> Access:
        """How remote data are reached."""
        return Access(self.cache_dir, self.cache_bytes, self.timeout_s, self.retries, self.allow_roots)

    @property
    def held_out(self) -> DataSettings | None:
        """The same settings for the held-out images in the place of the training images; None where there are none."""
        if self.validation is None:
            return None
        return self.model_copy(update={"train": self.validation, "validation": None})
