"""Labels by name: what is meant, and what could mean two things."""

import json

import pytest

import tarflow.cli
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
from tarflow.evaluation.samples.labels import parse_labels
from tarflow.models.provenance import Provenance
from tarflow.models.weights import save_weights_file
from tests.helpers.checkpoints import tell

NAMES = ["food", "smileys", "flags, coloured"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("smileys,food", (1, 0)),
        ("0, 2,none", (0, 2, -1)),
        ("None", (-1,)),
        ('"flags, coloured",1,-1', (2, 1, -1)),
        ("name:food,number:2", (0, 2)),
    ],
)
@pytest.mark.case("N15")
def test_classes_go_by_name_or_number(text, labels):
    assert parse_labels(text, 3, NAMES) == labels


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("smilys", NAMES, "no class is named 'smilys'; did you mean 'smileys'?"),
        ("FOOD", NAMES, "did you mean 'food'?"),
        ("zebra", NAMES, "classes: 0 food, 1 smileys, 2 flags, coloured"),
        ("9", NAMES, "label 9 is not one of the model's 3 classes: 0 food, 1 smileys"),
        ("9", None, "label 9 is not one of the model's 3 classes: 0..2, or none"),
        ("9", ["0", "1", "2"], "label 9 is not one of the model's 3 classes: 0..2, or none"),
        ("99999999999999999999999", NAMES, "no class is named"),
        ("-2", NAMES, "label -2 is not one of"),
        ("--3", NAMES, "no class is named"),
        ("", NAMES, "--labels is empty"),
        (" , ", NAMES, "--labels is empty"),
        ("0,,1", NAMES, "no class is named ''"),
        ("food", None, "names of the model's 3 classes are unknown: give numbers (0..2), or --classes"),
        ("food\nsmileys", NAMES, "--labels"),
    ],
)
@pytest.mark.case("N15")
def test_what_is_no_class_is_one_line(text, names, message):
    with pytest.raises(EvaluationError) as error:
        parse_labels(text, 3, names)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.case("N15")
def test_a_word_that_could_mean_two_classes_is_asked_about():
    digits = ["1", "10", "none", "7"]
    assert parse_labels("10", 4, digits) == (1,), "10 is no number of a class"
    assert parse_labels("2,name:1,number:1,name:none,-1", 4, digits) == (2, 0, 1, 2, -1)
    with pytest.raises(EvaluationError, match=r"'1' could be class number 1 or class number 0, whose name is '1'"):
        parse_labels("1", 4, digits)
    with pytest.raises(EvaluationError, match=r"'none' could be no label or class number 2.*name:none or -1"):
        parse_labels("none", 4, digits)
    assert parse_labels("0,1", 2, ["0", "1"]) == (0, 1), "names that are the numbers leave no doubt"


@pytest.mark.case("N15")
def test_a_model_without_classes_has_no_labels():
    assert parse_labels("none", 0, None) == (-1,)
    for text in ("0", "food"):
        with pytest.raises(EvaluationError, match="the model has none; leave --labels out"):
            parse_labels(text, 0, None)


def sampled(source, out, labels, **options):
    sample_images(SampleRequest(source=source, out=out, num=4, labels=labels, **options), lambda _: None)
    return json.loads((out / "settings.json").read_text())["sampling"]["labels"]


def set_marker(run_dir, **facts):
    tell(run_dir / "checkpoints/images-000000000160", **facts)


@pytest.mark.case("N15")
def test_names_come_from_the_checkpoint_the_file_or_an_option(make_run, make_model, tmp_path):
    run_dir, _ = make_run(steps=(10,))
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    with pytest.raises(EvaluationError, match="are unknown"):
        sampled(run_dir, tmp_path / "no", "smileys")
    assert sampled(run_dir, tmp_path / "option", "smileys", classes=tmp_path / "names.json") == [1]
    set_marker(run_dir, classes=NAMES)
    assert sampled(run_dir, tmp_path / "marker", "smileys,food") == [1, 0]
    model = make_model()
    known = Provenance(noise="uniform", noise_std=0.0, classes=tuple(NAMES))
    save_weights_file(tmp_path / "w.pth", model.config, model.state_dict(), known)
    assert sampled(tmp_path / "w.pth", tmp_path / "file", "smileys,food") == [1, 0]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(["food", "faces"]))
    for source in (run_dir, tmp_path / "w.pth"):
        with pytest.raises(EvaluationError, match=r"class 1 is 'faces' there, and 'smileys' in"):
            sampled(source, tmp_path / "no", "food", classes=other)
    assert not (tmp_path / "no").exists()


@pytest.mark.case("N15")
def test_an_older_checkpoint_takes_the_names_of_the_very_data_it_was_trained_on(make_run, tmp_path, digit_like):
    import shutil

    from tarflow.data_pipeline.index.build import build_index
    from tarflow.data_pipeline.storage.open_index import open_index

    data = tmp_path / "named"
    shutil.copytree(digit_like / "train", data)
    build_index(data, sorted(data.glob("*.tar")), classes=NAMES, processes=1)
    run_dir, _ = make_run(steps=(10,), data={"train": str(data)})
    set_marker(run_dir, data="another set")
    with pytest.raises(EvaluationError, match="are unknown"):
        sampled(run_dir, tmp_path / "no", "smileys")
    set_marker(run_dir, data=open_index(data).fingerprint)
    assert sampled(run_dir, tmp_path / "yes", "smileys") == [1]
    assert tarflow.cli.main(["checkpoint", "export", str(run_dir), "--out", str(tmp_path / "w.safetensors")]) == 0
    shutil.rmtree(data)
    assert sampled(tmp_path / "w.safetensors", tmp_path / "file", "smileys") == [1], "the file has them from then on"


@pytest.mark.case("N15")
def test_wrong_labels_as_typed_are_one_line(make_run, tmp_path, capsys):
    run_dir, _ = make_run(steps=(10,))
    set_marker(run_dir, classes=NAMES)
    for labels, message in (("9", "label 9 is not one of"), ("fod", "did you mean 'food'?")):
        assert tarflow.cli.main(["sample", str(run_dir), "--out", str(tmp_path / "out"), "--labels", labels]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
