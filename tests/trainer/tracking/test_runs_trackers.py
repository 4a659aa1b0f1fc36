"""What a training leaves in TensorBoard and in Weights & Biases, read back by their own readers. Real processes."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tarflow.errors import UserError
from tarflow.trainer.config.files import load_config
from tarflow.trainer.resilience.exit_codes import FINISHED
from tarflow.trainer.start.check import check_start
from tarflow.trainer.tracking.logger import MetricLogger
from tarflow.trainer.tracking.weights_and_biases import Place, WeightsAndBiases, check_wandb
from tests.helpers.runs import write_config

ROW = {
    "train/loss": -0.1, "train/bits_per_dim": 4.1, "optim/grad_norm": 1.0, "optim/lr": 1e-4, "throughput/images_per_sec": 9.0,
}  # fmt: skip
SETTINGS = ("log.every_steps=1", "log.tensorboard=true", "checkpoint.asynchronous=false")


@pytest.fixture(scope="module")
def killed_and_resumed(start, tiny_data, tmp_path_factory) -> Path:
    """A run that died at its sixth step and went on from 36 of its 72 images, with both trackers."""
    folder = tmp_path_factory.mktemp("tracked")
    config = write_config(
        folder / "c.yaml", tiny_data, train={"global_batch_size": 12, "max_images": 72},
        optim={"lr": 1e-3, "warmup_images": 24}, checkpoint={"every_images": 36},
    )  # fmt: skip
    run = folder / "runs" / "run"
    for fault in ("step@6=raise", ""):
        answer = start(config, run, *SETTINGS, "log.wandb=offline", ranks=2, fault=fault)
    assert answer["codes"] == [FINISHED] * 2
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


def records(run: Path) -> Iterator[tuple[str, Any]]:
    """(kind, record) of all offline files of a run, in the order of its starts."""
    record_type = import_module("wandb.proto.wandb_internal_pb2").Record
    data_store = import_module("wandb.sdk.internal.datastore").DataStore
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        store = data_store()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = record_type()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            yield kind, getattr(record, kind)


def test_weights_and_biases_has_the_metrics_of_every_start_under_one_id(killed_and_resumed) -> None:
    found = [*records(killed_and_resumed)]
    runs = [record for kind, record in found if kind == "run"]
    assert [record.run_id for record in runs] == [
        json.loads((killed_and_resumed / "run.json").read_text())["run_id"]
    ] * 2
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["optim.lr"] == 1e-3
    assert settings["train.global_batch_size"] == 12
    history = [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in record.item}
        for kind, record in found if kind == "history"
    ]  # fmt: skip
    logged = [
        {k: v for k, v in row.items() if k not in ("time", "sha") and "/" in k} for row in rows(killed_and_resumed)
    ]
    assert len(history) == len(logged) >= 7
    for ours, theirs in zip(logged, history):
        assert {name: theirs.get(name) for name in ours} == pytest.approx(ours, rel=1e-12)
        assert theirs["_step"] == theirs["images_seen"]
    assert [row["images_seen"] for row in history][-3:] == [48, 60, 72]


def test_tensorboard_has_each_point_once_and_the_settings(killed_and_resumed) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(killed_and_resumed / "tensorboard"))
    events.Reload()
    last = {row["images_seen"]: row for row in rows(killed_and_resumed)}  # of a point that was repeated, the second
    names = [name for name in rows(killed_and_resumed)[-1] if "/" in name]
    assert len(names) >= 15
    for name in names:
        points = events.Scalars(name)
        assert [point.step for point in points] == [12, 24, 36, 48, 60, 72], name
        assert [point.value for point in points] == pytest.approx([last[p.step][name] for p in points], rel=1e-6), name
    said = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    hparams = said.session_start_info.hparams
    assert hparams["optim.lr"].number_value == pytest.approx(1e-3)
    assert hparams["parallel.backend"].string_value
    shown = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content).experiment
    assert {(metric.name.group, metric.name.tag) for metric in shown.metric_infos} >= {
        ("", "train/bits_per_dim"), ("evaluation", "eval/bits_per_dim"),
    }  # fmt: skip


def test_metrics_count_what_was_lost_and_name_ranks(killed_and_resumed) -> None:
    first, *_, last = rows(killed_and_resumed)
    assert (first["goodput/images_lost"], last["goodput/images_lost"]) == (0, 12), "48 were logged, 36 were saved"
    assert 0 < last["goodput/share"] < 1
    assert last["goodput/useful_s"] < last["goodput/held_s"]
    assert last["memory/peak_rank"] in (0, 1)
    assert last["time/slowest_rank"] in (0, 1)
    assert last["time/straggler_ratio"] >= 1


FAKE = """
import os, sys

class Settings:
    model_fields = {{}}

class Run:
    def define_metric(self, *names, **options): pass
    def log(self, values, step): {log}
    def finish(self): print("a line that is no answer")

def init(**options):
    {init}
    return Run()
"""


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ({"init": "raise RuntimeError('the server does not answer')", "log": "pass"}, "the server does not answer"),
        ({"init": "print('hello')", "log": "raise OSError(28, 'No space left', '/full')"}, "/full: no space is left"),
        ({"init": "pass", "log": "os._exit(3)"}, "its process has ended"),
        ({"init": "pass", "log": "import time; time.sleep(60)"}, "has not taken the last metrics within 1 s"),
    ],
)
def test_a_library_that_fails_in_any_way_costs_its_own_points_alone(tmp_path, monkeypatch, capsys, fake, said) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE.format(**fake))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    tracker = WeightsAndBiases(tmp_path, "0" * 32, Place("offline", "p"))
    monkeypatch.setattr(tracker, "closing_s", 1.0)
    log = MetricLogger(tmp_path, [tracker], 100)
    log.begin(0, {"train": {"lr": 0.1}})
    for step in range(3):
        log.metrics(step, 10 * step, 100, ROW)
    child = tracker._process
    log.close()
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "Weights & Biases" in line]
    assert len(lines) == 1, "once"
    assert said in lines[0]
    assert len(rows(tmp_path)) == 3
    assert child is None or child.poll() is not None, "nothing is left behind"


def test_what_weights_and_biases_needs_is_said_before_a_run(monkeypatch, tiny_config, tmp_path) -> None:
    from tarflow.trainer.tracking import weights_and_biases

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    check_wandb("disabled")
    check_wandb("offline")
    with pytest.raises(UserError, match=r"log\.wandb=online finds no key.*`wandb login`.*log\.wandb=offline"):
        check_wandb("online")
    netrc.write_text("machine api.wandb.ai login user password 0\n")
    check_wandb("online")
    (tmp_path / "wandb").mkdir()  # W&B's own files, where a program was started before
    monkeypatch.syspath_prepend(str(tmp_path))
    check_wandb("offline")
    monkeypatch.setattr(weights_and_biases, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.wandb=offline needs the package wandb: pip install 'tarflow\[wandb\]'"):
        check_wandb("offline")
    config = load_config(tiny_config, ["log.wandb=offline"])
    with pytest.raises(UserError, match="needs the package wandb"):
        check_start(config, tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
