"""`tarflow checkpoint export` as a folder, and every command that takes it."""

import json

import pytest
import torch

import tarflow
from tarflow.cli import main
from tarflow.models.weights import read_weights
from tests.evaluation.conftest import digit_like, make_run, write_checkpoint  # noqa: F401 -- fixtures


def test_a_folder_goes_wherever_a_file_goes(make_run, digit_like, tmp_path, capsys):  # noqa: F811
    run_dir, _ = make_run()
    hub, file = tmp_path / "hub", tmp_path / "w.safetensors"
    assert main(["checkpoint", "export", str(run_dir), "--out", f"{hub}/"]) == 0
    assert main(["checkpoint", "export", str(run_dir), "--out", str(file)]) == 0
    assert (hub / "model.safetensors").read_bytes() == file.read_bytes()
    flow = tarflow.load(hub)
    assert torch.equal(flow.sample(3), tarflow.load(file).sample(3))
    assert "standard deviation 0.1" in flow.card
    assert "TarFlow" in (hub / "README.md").read_text()
    held_out = str(digit_like / "val")
    assert main(["sample", str(hub), "--out", str(tmp_path / "s"), "--num", "2"]) == 0
    assert main(["likelihood", str(hub), held_out, "--out", str(tmp_path / "l"), "--num", "2"]) == 0
    assert main(["encode", str(hub), held_out, "--out", str(tmp_path / "z"), "--num", "2"]) == 0
    assert main(["decode", str(hub), str(tmp_path / "z"), "--out", str(tmp_path / "d")]) == 0
    words = [f"data.train={digit_like / 'train'}", "evaluation.num_samples=6", "evaluation.grid=[1,1]"]
    assert main(["evaluate", str(hub), "--out", str(tmp_path / "e"), "--dry-run", "--rate", "1", *words]) == 0
    new = ["train", str(run_dir / "config.yaml"), "--run-dir", str(tmp_path / "new"), "train.max_images=16"]
    assert main([*new, "--init-from", str(hub), "log.tensorboard=false"]) == 0
    capsys.readouterr()
    assert main(["sample", str(run_dir), "--model", "channels=16", "--out", str(tmp_path / "no")]) == 2
    assert "--model channels=16 is for weights files" in capsys.readouterr().err


def test_what_was_inferred_stands_beside_the_samples(make_run, tmp_path, capsys):  # noqa: F811
    run_dir, config = make_run()
    assert main(["checkpoint", "export", str(run_dir), "--out", str(tmp_path / "w.pth")]) == 0
    torch.save(dict(read_weights(tmp_path / "w.pth").tensors), tmp_path / "theirs.pth")
    words = ["sample", str(tmp_path / "theirs.pth"), "--num", "1", "--noise-std", "0.1", "--out", str(tmp_path / "s")]
    assert main(words) == 2, "heads of 64 channels do not divide the model's 16"
    capsys.readouterr()
    assert main([*words, "--model", f"head_channels={config.model.head_channels}"]) == 0
    assert (
        "3 classes; assumed as published: no soft clip, scales by exp, images not scaled; as stated: head_channels=8"
        in capsys.readouterr().out
    )
    said = json.loads((tmp_path / "s/settings.json").read_text())["provenance"]
    assert said == {
        "model": "inferred from the shapes of the tensors", "assumed": {"soft_clip": 0.0, "scale": "exp", "input_scale": 1.0},
        "stated": {"head_channels": 8},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("out", "words", "message"),
    [
        ("w.safetensors", ["--format", "hf"], "--format hf, but --out {out} is named as a safetensors"),
        ("w.pth", ["--format", "safetensors"], "--format safetensors, but --out {out} is named as a pth"),
        ("folder/", ["--format", "pth"], "--format pth, but --out {out} is named as a hf"),
        ("folder", [], "or in / for a folder (--format hf)"),
        ("there/", [], "already exists: choose another name"),
        ("none/folder/", [], "does not exist"),
    ],
)
def test_a_format_that_contradicts_the_name_is_refused(make_run, tmp_path, capsys, out, words, message):  # noqa: F811
    run_dir, _ = make_run()
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    assert main(["checkpoint", "export", str(run_dir), "--out", f"{tmp_path}/{out}", *words]) == 2
    assert message.format(out=f"{tmp_path}/{out}") in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
