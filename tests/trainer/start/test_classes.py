"""Class maps: what one label means must be the same for training, held-out images, a run that goes on, and given weights."""

import json
from pathlib import Path

import pytest

import tarflow.cli
from tarflow.errors import UserError
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.provenance import Provenance
from tarflow.models.weights import read_header, save_weights_file
from tarflow.trainer.start.check import check_start
from tarflow.trainer.start.record import read_record

ABC = ["ant", "bee", "cat"]


def refused(config, run_dir: Path = Path("no/run"), init_from: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_start(config, run_dir, 1, init_from)
    return str(caught.value)


def notes(config, run_dir: Path = Path("no/run"), init_from: Path | None = None) -> list[str]:
    return check_start(config, run_dir, 1, init_from).notes


@pytest.fixture
def train_set(make_set) -> Path:
    return make_set("train", labels=[0, 1, 2] * 4, classes=ABC)


def with_validation(make_config, train: Path, validation: Path | str, **data):
    return make_config(train, data={"validation": str(validation), **data}, model={"num_classes": 3})


@pytest.mark.case("V03")
def test_held_out_images_that_lack_a_class_in_the_middle_are_refused_naming_both(
    make_set, make_config, train_set
) -> None:
    held_out = make_set("val", labels=[0, 1] * 2, classes=["ant", "cat"])
    said = refused(with_validation(make_config, train_set, held_out))
    assert said.startswith(
        f"the classes differ: 3 of data.train={train_set} (ant, bee, cat), 2 of data.validation={held_out} (ant, cat); "
        "label 1 is 'bee' in the one and 'cat' in the other. "
    )
    assert f"--classes {train_set}/classes.json`" in said
    assert "data.accept=[class_names]" in said
    assert "\n" not in said
    meant = notes(with_validation(make_config, train_set, held_out, accept=["class_names"]))
    assert any("the classes differ" in note and "says that this is meant" in note for note in meant)


@pytest.mark.parametrize(
    ("names", "labels"), [(["bee", "ant", "cat"], [0, 1, 2]), (["Ant", "bee", "cat"], [0, 1, 2]), (["x", "y"], [0, 1])]
)
@pytest.mark.case("V03")
def test_other_orders_and_names_are_refused(make_set, make_config, train_set, names, labels) -> None:
    assert "the classes differ" in refused(
        with_validation(make_config, train_set, make_set("val", labels, classes=names))
    )


@pytest.mark.case("V03")
def test_what_changes_no_label_is_said(make_set, make_config, train_set) -> None:
    fewer = make_set("fewer", labels=[0, 1], classes=["ant", "bee"])
    assert f"data.validation={fewer} lacks classes that data.train={train_set} has: cat" in notes(
        with_validation(make_config, train_set, fewer)
    )
    unnamed = make_set("unnamed", labels=[0, 1, 2])
    assert (
        f"data.validation={unnamed} does not name its classes: not compared with those of data.train={train_set}"
        in notes(with_validation(make_config, train_set, unnamed))
    )
    same = make_set("same", labels=[2, 1, 0], classes=ABC)
    assert notes(with_validation(make_config, train_set, same)) == []


@pytest.mark.case("V03")
def test_an_unconditional_model_has_no_classes_to_compare(make_set, make_config, train_set) -> None:
    held_out = make_set("val", labels=[0, 1], classes=["ant", "cat"])
    config = make_config(train_set, data={"validation": str(held_out)}, model={"num_classes": 0})
    assert not any("differ" in note for note in notes(config))


@pytest.mark.parametrize("label", [3, 7, -2])
@pytest.mark.case("V10")
def test_a_held_out_label_out_of_range_is_refused_at_the_start(make_set, make_config, train_set, label: int) -> None:
    held_out = make_set("val", labels=[0, 1, 2, max(label, 0)])
    if label < 0:
        from tarflow.data_pipeline.index.build import build_index

        relabel(held_out / "shard-000000.tar", label)
        build_index(held_out, [held_out / "shard-000000.tar"])
    for place in (held_out, f"file://{held_out}"):  # behind an address too
        said = refused(with_validation(make_config, train_set, place))
        assert said.startswith(f"data.validation: shard {place}/shard-000000.tar, sample '00000")
        assert f"label {label} is outside 0..2 (model.num_classes=3" in said


def relabel(shard: Path, label: int) -> None:
    """Give the first sample another label."""
    import io
    import tarfile

    with tarfile.open(shard) as tar:
        members = [(member, file.read()) for member in tar.getmembers() if (file := tar.extractfile(member))]
    first = next(k for k, (member, _) in enumerate(members) if member.name.endswith(".cls"))
    with tarfile.open(shard, "w") as tar:
        for k, (member, content) in enumerate(members):
            content = str(label).encode() if k == first else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.case("V10")
def test_held_out_images_without_labels_are_refused_at_the_start(make_set, make_config, train_set) -> None:
    held_out = make_set("val", labels=None)
    said = refused(with_validation(make_config, train_set, held_out))
    assert said.startswith(f"data.validation: the data set at {held_out} has no labels, the model has 3 classes")


def weights_of(path: Path, classes: list[str] | None) -> Path:
    config = TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=1, num_classes=3)
    provenance = Provenance(classes=None if classes is None else tuple(classes))
    save_weights_file(path, config, TarFlow(config).state_dict(), provenance)
    return path


@pytest.mark.case("V14")
def test_weights_of_other_classes_do_not_start_a_run(make_set, make_config, tmp_path: Path) -> None:
    data = make_set("data", labels=[0, 1, 2], classes=["A0", "a", "b"])
    config = make_config(data, model={"num_classes": 3})
    theirs = weights_of(tmp_path / "w.safetensors", ["a", "b", "c"])
    said = refused(config, init_from=theirs)
    assert f"3 of data.train={data} (A0, a, b), 3 of --init-from {theirs} (a, b, c); label 0 is 'A0'" in said
    assert not any(
        "differ" in note for note in notes(config, init_from=weights_of(tmp_path / "s.pth", ["A0", "a", "b"]))
    )
    silent = weights_of(tmp_path / "silent.safetensors", None)
    assert f"--init-from {silent} does not name its classes: not compared with those of data.train={data}" in notes(
        config, init_from=silent
    )
    meant = make_config(data, model={"num_classes": 3}, data={"accept": ["class_names"]})
    assert any("says that this is meant" in note for note in notes(meant, init_from=theirs))


@pytest.mark.case("V03")
def test_the_map_goes_into_run_and_checkpoints_and_holds_on_resume(make_set, make_config, tmp_path, capsys) -> None:
    from tarflow.trainer.config.files import config_text

    data = make_set("first/train", labels=[0, 1, 2] * 4, classes=ABC)
    held_out = make_set("first/val", labels=[0, 1, 2], classes=ABC)
    config = make_config(data, data={"validation": str(held_out)}, model={"num_classes": 3}, train={"max_images": 8})
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(config_text(config))
    assert tarflow.cli.main(["train", str(file), "--run-dir", str(run)]) == 0
    assert "data: 12 images, 8 x 8, RGB, 3 classes; held out: 3 images" in (run / "log.txt").read_text()
    record = read_record(run)
    assert record is not None
    assert record.validation is not None
    assert (record.place, record.num_samples, record.classes, record.num_classes) == (str(data), 12, ABC, 3)
    assert (record.image_size, record.channels) == ([8, 8], 3)
    assert (record.validation.classes, record.validation.num_samples) == (ABC, 3)
    (marker,) = (run / "checkpoints").glob("*/COMMITTED")
    told = json.loads(marker.read_text())
    assert (told["classes"], told["data"]) == (ABC, record.fingerprint)
    out = tmp_path / "w.safetensors"
    assert tarflow.cli.main(["checkpoint", "export", str(run), "--out", str(out)]) == 0
    assert read_header(out).provenance.classes == tuple(ABC)
    # Another map under the same run: refused even where another data set would be accepted.
    other = make_set("other", labels=[0, 1, 2] * 5, classes=["bee", "ant", "cat"])
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "log.txt"}
    words = [
        "train",
        str(file),
        "--run-dir",
        str(run),
        f"data.train={other}",
        "data.validation=null",
        "train.max_images=16",
    ]
    capsys.readouterr()
    assert tarflow.cli.main([*words, "--accept-new-data"]) == 2
    assert (
        f"the classes differ: 3 of data.train={other} (bee, ant, cat), 3 of the run {run} (ant, bee, cat)"
        in capsys.readouterr().err
    )
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "log.txt"} == before
    # And as the beginning of another run: by number refused, by name taken over.
    words = [
        "train",
        str(file),
        "--run-dir",
        str(tmp_path / "new"),
        f"data.train={other}",
        "data.validation=null",
        "--init-from",
        str(run),
    ]
    assert tarflow.cli.main([*words, "--dry-run"]) == 2
    assert f"3 of --init-from {run} (ant, bee, cat); label 0 is 'bee'" in capsys.readouterr().err
    assert tarflow.cli.main([*words, "--init-partial", "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()
