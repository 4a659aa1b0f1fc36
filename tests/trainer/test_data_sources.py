"""Where the training data may lie: behind HTTP, in pipes. The settings of section `data` reach the loader."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.loop import train
from tarflow.trainer.resilience.exit_codes import FINISHED


class Quiet(SimpleHTTPRequestHandler):
    """Python's own server: whole files only, no ranges."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


@pytest.fixture
def address(tiny_data: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tiny_data)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_training_over_http_equals_training_from_disk(tiny_config: Path, address: str, tmp_path: Path) -> None:
    short = ["train.max_images=160", "checkpoint.every_images=0"]
    cache = tmp_path / "cache"
    far = [
        f"data.train={address}",
        f"data.cache_dir={cache}",
        "data.cache_bytes=1Mi",
        "data.timeout_s=5",
        "data.retries=1",
    ]
    assert train(load_config(tiny_config, short), tmp_path / "near") == FINISHED
    assert train(load_config(tiny_config, short + far), tmp_path / "far") == FINISHED
    near, over = (load_weights(find(tmp_path / run), "raw") for run in ("near", "far"))
    assert all(torch.equal(near[name], over[name]) for name in near)
    assert any(path.endswith(".tar") for path in Quiet.asked)
    assert any(cache.rglob("*"))
    # And back on the disk: the same data set, whatever its address.
    assert (
        train(load_config(tiny_config, ["train.max_images=320", "checkpoint.every_images=0"]), tmp_path / "far")
        == FINISHED
    )
    assert find(tmp_path / "far").images_seen == 320


def test_tars_through_a_pipe_train_as_a_stream(tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    shards = sorted(tiny_data.rglob("*.tar"))
    numbers = f"{{{shards[0].stem.rsplit('-')[-1]}..{shards[-1].stem.rsplit('-')[-1]}}}"
    pipe = f"data.train=pipe:cat {shards[0].parent}/{shards[0].stem.rsplit('-', 1)[0]}-{numbers}.tar"
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    short = [pipe, cache, "train.max_images=160", "checkpoint.every_images=80"]
    run = tmp_path / "run"
    assert train(load_config(tiny_config, short), run) == FINISHED
    assert train(load_config(tiny_config, [*short, "train.max_images=240"]), run) == FINISHED
    assert find(run).images_seen == 240
    with pytest.raises(TrainerError, match=r"optim\.warmup_images=0 .* length is not known"):
        train(load_config(tiny_config, [*short, "optim.warmup_images=0"]), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_reader_that_does_not_suit_the_data_is_refused_before_anything_is_made(
    tiny_config: Path, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=r"data\.reader=indexed or auto, not mds"):
        train(load_config(tiny_config, ["data.reader=mds"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
