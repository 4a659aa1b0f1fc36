"""A configuration from anywhere: no number, no product of numbers and no text leads further than to one clear error."""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import annotated_types
import pytest
import yaml
from pydantic import BaseModel, ValidationError

import tarflow.cli
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.profile import ClusterProfile, load_profile
from tarflow.trainer.config.files import config_text, load_config
from tarflow.trainer.config.plain_yaml import MOST_BYTES, MOST_DEPTH, MOST_NODES, parse_yaml
from tarflow.trainer.config.products import PRODUCTS
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError

TREE: dict[str, Any] = {
    "data": {"train": "set/train"},
    "model": {"image_size": 8, "patch_size": 4, "channels": 64, "num_blocks": 2, "layers_per_block": 1},
    "train": {"global_batch_size": 16, "max_images": 64},
}
# Bounds that a validator states in words of its own, on both sides: see `test_the_words_of_validators`.
IN_WORDS = {"model.in_channels", "ema.relative_stds", "ema.decays"}
HUGE = ("1e400", "-1e400", ".nan", "nan", "-.inf", "inf", "1e308", "-1e308", "9" * 400, "9" * 5000, "-1", "-1e18", "1e18",
        "1e-400", "1e-320", "0x7fffffff", "99999999999999999999", "256Gi", "9" * 40 + "Gi", "[]", "{a: 1}", "1e", "²")  # fmt: skip


def numbers(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[Any], bool]]:
    """(setting, its constraints, whether it is a list) of every field with a number in it, at any depth."""
    for name, field in model.model_fields.items():
        annotation, key = field.annotation, prefix + name
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from numbers(annotation, f"{key}.")
            continue
        kinds, constraints = leaves(annotation)
        if kinds & {int, float}:
            yield key, [*field.metadata, *constraints], tuple in kinds


def leaves(annotation: Any) -> tuple[set[Any], list[Any]]:
    """Types that an annotation is made of, and the constraints inside it."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        kinds, constraints = leaves(annotation.__origin__)
        metadata = [part for item in annotation.__metadata__ for part in getattr(item, "metadata", [item])]
        return kinds, constraints + metadata
    parts = [leaves(part) for part in get_args(annotation) if part is not Ellipsis]
    kinds = {getattr(annotation, "__origin__", annotation)}.union(*(kind for kind, _ in parts))
    return kinds, [item for _, items in parts for item in items]


NUMBERS = {key: (constraints, many) for key, constraints, many in numbers(Config)}
OF_PROFILES = {key: (constraints, many) for key, constraints, many in numbers(ClusterProfile)}


def has_bounds(constraints: list[Any]) -> bool:
    def any_of(*kinds: type) -> bool:
        return any(isinstance(item, kinds) for item in constraints)

    return any_of(annotated_types.Ge, annotated_types.Gt, annotated_types.Interval) and any_of(
        annotated_types.Le, annotated_types.Lt, annotated_types.Interval
    )


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    """The one error's text, which comes at once."""
    began = time.process_time()
    with pytest.raises(TrainerError) as caught:
        load(folder, text, *overrides)
    assert time.process_time() - began < 4
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.case("H10")
def test_every_number_of_a_configuration_and_of_a_profile_has_bounds_on_both_sides() -> None:
    assert len(NUMBERS) > 50
    assert {key.split(".")[0] for key in NUMBERS} == set(Config.model_fields) - {"compile"}
    without = [key for key, (constraints, _) in NUMBERS.items() if not has_bounds(constraints)]
    assert set(without) == IN_WORDS
    assert [key for key, (constraints, _) in OF_PROFILES.items() if not has_bounds(constraints)] == []
    assert set(OF_PROFILES) > {"gpus", "cpus", "time"}


def test_the_words_of_validators_bound_both_sides(tmp_path: Path) -> None:
    for key, wrong in (("model.in_channels", ("0", "2", "4")), ("ema.relative_stds", ("[0]", "[0.28]", "[-1]", "[1e9]")),
                       ("ema.decays", ("[0]", "[1]", "[-1]", "[1e300]"))):  # fmt: skip
        for value in wrong:
            assert key in refused(tmp_path, yaml.safe_dump(TREE), f"{key}={value}")


@pytest.mark.case("H10")
def test_lists_of_a_configuration_are_short(tmp_path: Path) -> None:
    for key, value in (("ema.relative_stds", 0.1), ("ema.decays", 0.9), ("evaluation.variants", {"guidance": 1}),
                       ("train.skip_images", [1, 2])):  # fmt: skip
        assert key in refused(tmp_path, yaml.safe_dump(TREE), f"{key}={yaml.safe_dump([value] * 1200, width=1e9)}")


@pytest.mark.parametrize("way", ["override", "file"])
@pytest.mark.case("H10")
def test_no_number_gets_further_than_to_one_error_that_names_its_setting(tmp_path: Path, way: str) -> None:
    """Each value tried is an error line that names field and value, or a number within the field's bounds."""
    refused = 0
    for key, (_, many) in NUMBERS.items():
        for value in HUGE if way == "override" else HUGE[:8]:
            given = f"[{value}, {value}]" if many else value
            tree = copy.deepcopy(TREE)
            section, _, name = key.partition(".")
            if way == "file":
                tree.setdefault(section, {})[name] = yaml.load(given, yaml.BaseLoader)
            try:
                config = load(tmp_path, yaml.safe_dump(tree), *([f"{key}={given}"] if way == "override" else []))
            except TrainerError as caught:
                text, refused = str(caught), refused + 1
                assert key in text, (key, value, text)
                assert value[:60] in text or way == "file", (key, value, text)  # there, as a number
                assert len(text) < 1000
            else:
                assert not value.strip("-.").lower().startswith(("nan", "inf", "1e4", "1e308", "9")), (key, value)
                assert load(tmp_path, config_text(config)) == config
    assert refused > 10 * len(NUMBERS) if way == "override" else 6 * len(NUMBERS)


@pytest.mark.case("H10")
def test_a_profile_is_bounded_in_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    for key in OF_PROFILES:
        for value in ("1e400", ".nan", "9" * 400, "9" * 5000, "-1e400", "1e18"):
            path.write_text(f"{key}: {value}\n")
            with pytest.raises(ClusterError) as caught:
                load_profile(path)
            assert key in str(caught.value)
    for value in ("9" * 400 + "G", "1e400", "-1G", "nan"):
        path.write_text(f"mem: {value}\n")
        with pytest.raises(ClusterError, match="mem="):
            load_profile(path)
    with pytest.raises(ClusterError, match=r"gpus=2000.*less than or equal to 1024"):
        load_profile(None, {"gpus": 2000})


@pytest.mark.case("H10")
def test_products_are_bounded_and_name_their_factors(tmp_path: Path) -> None:
    """The largest value that each factor may have by itself: of every product, some pair is too much."""
    for keys, most, what in PRODUCTS:
        largest = {key: limit(key) for key in keys if not key.startswith("model.")} or {"model.image_size": 1 << 14}
        tree = copy.deepcopy(TREE)
        tree["model"] |= {"image_size": 1 << 14, "patch_size": 1 << 14}
        tree |= {
            "evaluation": {"grid": [1, 1], "num_samples": 2, "neighbour_samples": 1},
            "sampling": {"batch_size": 1},
        }
        for key, value in largest.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = [value] * 2 if name == "grid" else value
        text = refused(tmp_path, yaml.safe_dump(tree))
        assert what in text, (keys, text)
        assert f"{most:.2g} is the most" in text
        assert all(f"{key}=" in text for key in keys)


def limit(key: str) -> int:
    constraints, _ = NUMBERS[key]
    return min(int(str(item.le)) for item in constraints if isinstance(item, annotated_types.Le))


@pytest.mark.case("H10")
def test_the_settings_that_the_product_ships_are_within_every_bound() -> None:
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    assert len(configs) > 5
    for path in configs:
        load_config(path, ["train.max_images=1e12", "data.num_workers=64", "sampling.batch_size=4096"])


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))
DOCUMENTS = {
    "a billion nodes by aliases": (BOMB, "more than 20,000 values"),
    "lists 3,000 deep": ("a: " + "[" * 3000 + "]" * 3000, f"nested too deeply, more than {MOST_DEPTH} levels"),
    "mappings 3,000 deep": ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "blocks 900 deep": ("\n".join(" " * i + "a:" for i in range(900)), "line 32: nested too deeply"),
    "3,000 deep by aliases": (CHAIN, "nested too deeply"),
    "open brackets alone": ("[" * 900_000, "nested too deeply"),
    "a list in itself": ("a: &a [*a]", "recursive"),
    "a merge of itself": ("a: &a\n  <<: *a\n", "recursive"),
    "too many bytes": ("#" * (MOST_BYTES + 1), "more than 1,048,576 bytes"),
    "too many values": ("- x\n" * (MOST_NODES + 1), "more than 20,000 values"),
    "a tag that makes an object": ("a: !!python/object/apply:os.system [echo]", "the tag '!!python/object/apply:os.system'"),
    "a tag of another tool": ("a: !env HOME", "the tag '!env'"),
    "a byte that is no text": ("a: \x00", "special characters are not allowed"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.case("H10")
def test_documents_are_bounded_in_files_overrides_and_profiles(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)
    assert message in refused(tmp_path, yaml.safe_dump(TREE), f"data.accept={text}")
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=r"site\.yaml") as caught:
        load_profile(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.case("H10")
def test_plain_tags_and_repeated_aliases_are_read() -> None:
    text = "a: &a {x: !!int 3, y: ! z}\nb: [*a, *a]\n" + "".join(f"k{i}: *a\n" for i in range(1000))
    tree = parse_yaml(text, "text")
    assert tree["a"] == {"x": "3", "y": "z"}
    assert tree["b"] == [tree["a"]] * 2
    assert parse_yaml("- x\n" * (MOST_NODES - 1), "text") == ["x"] * (MOST_NODES - 1)
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_yaml(deep, "text") != []


@pytest.mark.case("H10")
def test_a_value_is_shown_in_its_first_characters_and_faults_are_counted(tmp_path: Path) -> None:
    assert "... (900,002 characters)" in refused(tmp_path, yaml.safe_dump(TREE), f"train.seed={'x' * 900_000}")
    many = TREE | {f"part{i}": {} for i in range(500)}
    with pytest.raises(TrainerError) as caught:
        load(tmp_path, yaml.safe_dump(many))
    assert str(caught.value).splitlines()[20:] == ["and 480 more"]


@pytest.mark.parametrize("override", ["model.num_blocks=2000000000", "model.num_classes=3e11", "model.channels=1e400",
                                      "train.max_images=1e400", "train.global_batch_size=1e400",
                                      "data.prefetch_batches=99999999999"])  # fmt: skip
@pytest.mark.case("H10")
def test_the_dry_run_refuses_in_one_line(tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    began = time.process_time()
    assert tarflow.cli.main(["train", str(path), "--dry-run", override]) == 2
    assert time.process_time() - began < 4
    shown = capsys.readouterr()
    assert shown.out == ""
    assert override.partition("=")[0] in shown.err
    assert len(shown.err.strip().splitlines()) == 1


@pytest.mark.case("H10")
def test_a_section_by_itself_is_bounded_as_well() -> None:
    """Whoever builds a section without a file meets the same bounds."""
    for section in (field.annotation for field in Config.model_fields.values()):
        assert isinstance(section, type)
        assert section.model_config.get("allow_inf_nan") is False
        assert section.model_config.get("extra") == "forbid"
    with pytest.raises(ValidationError):
        Config.model_validate(TREE | {"optim": {"lr": float("inf")}})


@pytest.mark.parametrize(
    ("text", "kind"),
    [("", "it is empty"), ("# all commented out", "it is empty"), ("- a", "not a list"), ("a", "not text")],
)
def test_a_file_that_holds_no_sections_is_said_in_words(tmp_path: Path, text: str, kind: str) -> None:
    assert refused(tmp_path, text).endswith(f"must hold sections (data:, model:, train:, ...), {kind}")
