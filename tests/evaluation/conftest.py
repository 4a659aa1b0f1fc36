"""Tiny models and data for the tests of the evaluation room."""

import pytest
import torch

from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tests.helpers.data import bars, prepared
from tests.helpers.features import NoSpatial


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_config(**changes):
    base = {
        "image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2, "layers_per_block": 1,
        "head_channels": 8, "num_classes": 3,
    }  # fmt: skip
    return TarFlowConfig(**(base | changes))


def tiny_model(seed=0, moved=0.1, **changes):
    """A model away from the identity: every parameter is moved by normal noise."""
    model = TarFlow(model_config(**changes))
    init_weights(model, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=rng))
    return model.eval()


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def digit_like(tmp_path_factory):
    """48 + 12 grey 8 px images in 3 classes (a bright bar at another height), as two indexed data sets."""
    return prepared(tmp_path_factory.mktemp("data"), *bars(), val_fraction=0.2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digit_like):
    """A weights file of a flow that was trained on `digit_like` until it knows bars from noise: 50 steps, 16 tokens, classes."""
    from tarflow.data_pipeline.loading.settings import DataSettings
    from tarflow.evaluation.images.data_set import ImageSet
    from tarflow.models.flow import flow_loss
    from tarflow.models.provenance import Provenance
    from tarflow.models.randomness import keyed_normal
    from tarflow.models.weights import save_weights_file

    torch.set_num_threads(1)
    config = model_config(patch_size=2, channels=32, head_channels=16)
    model = TarFlow(config)
    init_weights(model, 0)
    images = ImageSet(DataSettings.of(digit_like / "train"), config)
    pixels, labels, _ = (torch.cat(parts) for parts in zip(*images.batches(True)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(50):
        noisy = pixels / 127.5 - 1 + 0.1 * keyed_normal(0, "noise", step, range(len(pixels)), (1, 8, 8))
        flow_loss(*model(noisy, labels)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    known = Provenance(noise="gaussian", noise_std=0.1, label_dropout=0.0, classes=("0", "1", "2"))
    path = tmp_path_factory.mktemp("trained") / "trained.safetensors"
    save_weights_file(path, config, model.state_dict(), known)
    return path


def write_checkpoint(run_dir, config, step, images_seen, seed=0, scale=0.1, averages=None):
    """Commit a checkpoint of a moved model, through the trainer's own functions."""
    import tarflow.trainer.checkpoint.commit as store
    from tarflow.trainer.checkpoint.tensors import write_tensors
    from tarflow.trainer.config.files import config_text

    model = tiny_model(seed, scale, **config.model.model_dump())
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors["buffer/var"] = model.var
    for i, name in enumerate(config.ema.names if averages is None else averages):
        tensors |= {f"{name}/{k}": p.detach() * (1 - 0.01 * (i + 1)) for k, p in model.named_parameters()}
    temporary = store.temporary_dir(run_dir, images_seen)
    write_tensors(temporary, tensors)
    (temporary / "config.yaml").write_text(config_text(config))
    return store.commit(run_dir, temporary, step, images_seen, {"world_size": 1})


@pytest.fixture
def save_checkpoint():
    return write_checkpoint


@pytest.fixture
def make_run(tmp_path, digit_like):
    """A run directory with checkpoints at given steps (16 images each), and its configuration."""
    from tarflow.trainer.config.files import parse_config
    from tarflow.trainer.run_dir import create_run, save_config

    def make(steps=(10, 20), name="run", **sections):
        tree = {
            "data": {"train": str(digit_like / "train"), "validation": str(digit_like / "val")},
            "model": model_config().model_dump(),
            "train": {"global_batch_size": 16, "max_images": 320, "noise_std": 0.1},
            "sampling": {"guidance": 1.0, "batch_size": 16},
            "evaluation": {"num_samples": 24, "grid": [3, 4]},
        }
        for section, values in sections.items():
            tree[section] = tree.get(section, {}) | values
        config = parse_config(tree, "test")
        run_dir = tmp_path / name
        create_run(run_dir)
        save_config(run_dir, config)
        for step in steps:
            write_checkpoint(run_dir, config, step, 16 * step)
        return run_dir, config

    return make


class FakeFeatures(NoSpatial):
    """Eight columns of an image in place of a network: instant, and different for different images."""

    sha256, preprocessing, dim = "f00d", "none", 8

    num_classes = 0

    def __init__(self, name="fake", device="cpu", file=None):
        self.name, self.warnings = name, []

    def __call__(self, images):
        return images.float().flatten(1)[:, 1::7][:, :8]


@pytest.fixture
def fake_features(monkeypatch):
    monkeypatch.setattr("tarflow.evaluation.worker.real_images.Features", FakeFeatures)
    return FakeFeatures
