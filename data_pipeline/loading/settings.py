"""Section `data` of a run's configuration, which is also what a loader takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.storage.access import Access, address
from tarflow.settings import MOST_SECONDS, Count, Section, at_home, first_reason


def _place(value: Any) -> Any:
    """A path in its plain form; addresses and pipes unchanged."""
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str) or text.startswith("pipe:"):
        return text
    return address(text) or str(Path(at_home(text)))


Place = Annotated[str, BeforeValidator(_place)]
_FUNCTION = re.compile(r"(?:[^\W\d]\w*(?:\.[^\W\d]\w*)*|.*[^/]\.py):[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def _function(value: Any) -> Any:
    """`module:function`, or `FILE.py:function` with a leading `~` expanded."""
    if value is None or not isinstance(value, str):
        return value
    if not _FUNCTION.fullmatch(value):
        raise ValueError("it must have the form module:function or FILE.py:function")
    module, _, name = value.rpartition(":")
    return f"{at_home(module)}:{name}" if module.endswith(".py") else value


FunctionName = Annotated[str, BeforeValidator(_function)]


class DataSettings(Section):
    """Where the images are and how they are read."""

    train: Place = Field(
        description="training images: folder or address of shards with an index (made by `tarflow data prepare` or "
        "`tarflow data index`), or `pipe:COMMAND` and addresses of tars without one, read as streams"
    )
    validation: Place | None = Field(
        None, description="held-out images for bits per dimension: folder or address of shards with an index"
    )
    dataset: FunctionName | None = Field(
        None,
        description="a data set of your own, `module:function` or `FILE.py:function`: called with data.train, and with "
        "data.validation, it returns anything with __len__ and __getitem__ -> (image, label). null = they are places of shards",
    )
    transform: FunctionName | None = Field(
        None,
        description="augmentation of your own, `module:function` or `FILE.py:function`: called with each training image "
        "(uint8 [H, W, C]) and a random generator keyed by train.seed, epoch and image, it returns an image",
    )
    crop: Literal["centre", "random", "adm", "edm"] | None = Field(
        None,
        description="how images of another size than the model's are cropped and resized as they are read: centre (the largest "
        "centred box, bicubic), adm or edm (the centre crops of these papers), random (random resized crop of training images, "
        "keyed by train.seed, epoch and image; held-out images are centred). null = as the set was prepared, else centre",
    )
    reader: Literal["auto", "indexed", "mds", "stream"] = Field(
        "auto",
        description="how data.train is read: auto decides by what it finds; stream needs no index, but its order depends "
        "on the number of ranks and it resumes at the nearest shard",
    )
    cache_dir: Annotated[str, BeforeValidator(at_home)] | None = Field(
        None,
        description="folder where the processes of a node cache remote shards; use a local disk. "
        "null = in the system's temporary folder",
    )
    cache_bytes: Count = Field(
        32 << 30,
        ge=0,
        le=1 << 50,
        description="size limit of that cache; 0 = no cache, one range request per sample",
    )
    timeout_s: float = Field(
        30.0, gt=0, le=MOST_SECONDS, description="seconds without a byte after which a remote request is aborted"
    )
    retries: Count = Field(5, ge=0, le=1000, description="attempts after the first failed one of a remote request")
    allow_roots: tuple[str, ...] = Field(
        (),
        max_length=100,
        description="further addresses (s3://bucket/sets) that shards may lie under and redirects may lead to, besides "
        "the address of the index",
    )
    flip: bool = Field(False, description="mirror a random half of the images left to right")
    num_workers: Count = Field(
        0,
        ge=0,
        le=1024,
        description="decoding processes per rank; raise it while time/data_wait_s is above zero. "
        "0 = a thread of the training process",
    )
    prefetch_batches: Count = Field(4, gt=0, le=1024, description="batches to prefetch per rank")
    num_canonical_nodes: Count = Field(
        1,
        gt=0,
        le=1 << 20,
        description="independently shuffled partitions of the data set; set it to the number of nodes so that each "
        "node reads almost only its own. Changes the order of the samples",
    )
    shuffle_block: Count = Field(
        65536,
        gt=0,
        le=1 << 40,
        description="samples per shuffle block, within which samples are mixed; smaller blocks read fewer shards at a "
        "time. Changes the order of the samples",
    )
    on_error: Literal["strict", "skip"] = Field(
        "strict", description="damaged image: strict stops the run, skip replaces the image and counts it"
    )
    max_image_pixels: Count = Field(
        MAX_PIXELS,
        gt=0,
        le=1 << 34,
        description="pixels of the largest image that is decoded; for a JPEG, at the reduced size it is decoded at",
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="fraction of damaged images above which a run with on_error=skip stops"
    )
    accept: tuple[Literal["grey", "spare_classes", "class_names"], ...] = Field(
        (),
        description="mismatches of data and model that are intended: grey (colour images, grey model), spare_classes "
        "(more classes in the model than in the data), class_names (other names than in validation, checkpoint or weights)",
    )

    # Names of functions that whoever runs this program has given in person: no others are imported. See docs/security.md.
    _given: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="after")
    def _one_way_of_reading(self) -> DataSettings:
        if self.dataset is not None and self.reader != "auto":
            raise ValueError(
                f"data.reader={self.reader} reads shards, and data.dataset={self.dataset} replaces them: set one"
            )
        return self

    @classmethod
    def of(cls, train: str | Path, **settings: Any) -> DataSettings:
        """The settings of a loader that is used on its own. Raises DataError, naming the setting that is out of range."""
        try:
            made = cls(train=train, **settings)
            made.allow_code()
            return made
        except ValidationError as error:
            first, why = error.errors()[0], first_reason(error)
            why = why[0].lower() + why[1:]
            if not first["loc"]:  # settings that contradict each other
                raise DataError(why) from None
            raise DataError(f"data.{first['loc'][0]} cannot be {first['input']!r}: {why}") from None

    def allow_code(self, *settings: str) -> None:
        """Let the functions that these settings (`dataset`, `transform`; none: both) name be imported.

        For a configuration, or a setting, that whoever runs the program has given in person.
        """
        names = (getattr(self, setting) for setting in settings or ("dataset", "transform"))
        self._given |= frozenset(name for name in names if name is not None)

    def allow_code_of(self, other: DataSettings) -> None:
        """Let those functions be imported that may be for `other`."""
        self._given |= other._given

    def code(self, setting: Literal["dataset", "transform"]) -> str | None:
        """The name of the function that `data.SETTING` names, None where it names none.

        Raises DataError where the setting was only found in a file that may be anyone's, as a run directory's.
        """
        name: str | None = getattr(self, setting)
        if name is not None and name not in self._given:
            raise DataError(
                f"data.{setting}={name} stands in the configuration of a run, which may come from anyone, and would be "
                f"imported as code: it is only if you name it yourself. Look at it, then add data.{setting}={name}"
            )
        return name

    @property
    def place(self) -> str:
        """What messages and records call the training images."""
        return self.train if self.dataset is None else f"{self.dataset}({self.train!r})"

    @property
    def access(self) -> Access:
        """How remote data are reached."""
        return Access(self.cache_dir, self.cache_bytes, self.timeout_s, self.retries, self.allow_roots)

    @property
    def held_out(self) -> DataSettings | None:
        """The same settings, reading the held-out images, without a transform; None where there are none."""
        if self.validation is None:
            return None
        return self.model_copy(update={"train": self.validation, "validation": None, "transform": None})
