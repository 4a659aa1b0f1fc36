"""Results of an evaluation in TensorBoard and Weights & Biases, read back by their own readers."""

import json
from importlib import import_module
from pathlib import Path

from PIL import Image

from tarflow.evaluation import results
from tarflow.trainer.run_dir import run_id
from tests.helpers.results import write_result


def add_result(run_dir: Path, config, images: int, colour: str) -> None:
    """A result with its scores and its grid."""
    path = write_result(
        run_dir, config, f"images-{images:012d}", fd_efficientnet_lite0=images / 10, bits_per_dim=4.25
    )  # fmt: skip
    Image.new("RGB", (120, 90), colour).save(path.parent / "grid.png")


def logged(run_dir: Path) -> list[dict]:
    """The points of all W&B files, in the order of their making, with the pixel colour and size of each grid."""
    record_type = import_module("wandb.proto.wandb_internal_pb2").Record
    data_store = import_module("wandb.sdk.internal.datastore").DataStore
    points = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        store = data_store()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = record_type()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ran = record.run
            if record.WhichOneof("record_type") == "history":
                point = {"id": ran.run_id, "group": ran.run_group, "job": ran.job_type}
                for item in record.history.item:
                    point["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
                picture = Image.open(path.parent / "files" / point["eval/grid/path"])
                points.append(point | {"pixel": picture.getpixel((5, 5)), "size": picture.size})
    return points


def test_every_result_and_its_grid_is_in_both_trackers_once(make_run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, config = make_run(steps=(), log={"wandb": "offline"})
    said: list[str] = []
    add_result(run_dir, config, 320, "red")
    results.announce(run_dir, config, log=said.append)
    add_result(run_dir, config, 160, "blue")  # of an older checkpoint, after the newer one
    results.announce(run_dir, config, log=said.append)
    results.announce(run_dir, config, log=said.append)
    assert said == []
    points = logged(run_dir)
    assert [(point["images_seen"], point["eval/fd_efficientnet_lite0"]) for point in points] == [
        (320, 32.0),
        (160, 16.0),
    ]
    assert [(point["pixel"], point["size"]) for point in points] == [((255, 0, 0), (120, 90)), ((0, 0, 255), (120, 90))]
    identity = run_id(run_dir)
    assert {(point["id"], point["group"], point["job"]) for point in points} == {
        (f"{identity}-evaluation", f"run {identity[:8]}", "evaluation")
    }
    events = EventAccumulator(str(run_dir / "tensorboard/evaluation"))
    events.Reload()
    assert [(p.step, p.value) for p in events.Scalars("eval/fd_efficientnet_lite0")] == [(320, 32.0), (160, 16.0)]
    assert [(p.step, p.width, p.height) for p in events.Images("eval/grid")] == [(320, 120, 90), (160, 120, 90)]


def test_a_tracker_that_fails_costs_no_result(make_run, tmp_path) -> None:
    run_dir, config = make_run(steps=())
    (run_dir / "tensorboard").symlink_to(tmp_path / "elsewhere")
    said: list[str] = []
    add_result(run_dir, config, 320, "red")
    results.announce(run_dir, config, log=said.append)
    (line,) = said
    assert line.startswith("WARNING: TensorBoard failed, the run goes on without it: ")
    assert "images-000000000320" in (run_dir / "evals.jsonl").read_text()
    assert not (tmp_path / "elsewhere").exists()
