"""Memory: each stage takes what fits, halves it once, and then names the setting; no image depends on its batch."""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tarflow
from tarflow.evaluation import batches
from tarflow.evaluation.batches import Batches, Fitted
from tarflow.evaluation.errors import DeviceFailedError, EvaluationError
from tarflow.evaluation.flow import Flow
from tarflow.evaluation.latents.encode import EncodeRequest, encode_images
from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods
from tarflow.evaluation.likelihood.per_image import likelihoods
from tarflow.evaluation.metrics.bits_per_dim import BitsPerDim, NoiseSettings
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.samples import draw
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.models.cost import SHARE, denoising_bytes, likelihood_bytes
from tarflow.models.flow import TarFlow
from tarflow.records import save_record

GUIDED = ResolvedSampling(noise_std=0.2).with_changes(guidance=1.5, denoise=1.0)


def too_large(most: int, real: Callable[..., Any], of: int) -> Callable[..., Any]:
    """`real`, on a device that holds `most` images: argument number `of` has the batch."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        if len(args[of]) > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried for {len(args[of])}\nadvice")
        return real(*args, **kwargs)

    return limited


def free(monkeypatch: pytest.MonkeyPatch, amount: float | None) -> None:
    monkeypatch.setattr(batches, "free_bytes", lambda _: amount)


@pytest.mark.parametrize(("room", "taken"), [(1.0, 1), (2.9, 2), (4.1, 4), (7.9, 4), (100.0, 12)])
def test_denoising_and_likelihood_are_split_by_what_is_free_and_keep_every_bit(
    make_model, monkeypatch, room: float, taken: int
) -> None:
    model = make_model()
    free(monkeypatch, None)
    whole = Sampler(model, GUIDED, Batches()).draw(range(12))
    pixels, labels, ids = torch.arange(12 * 64).remainder(256).to(torch.uint8).view(12, 1, 8, 8), torch.arange(12) % 3, torch.arange(12)  # fmt: skip
    noise = NoiseSettings("uniform", 0.0, draws=2)
    bits = BitsPerDim(noise)
    bits.add(model, pixels, labels, ids, Batches())

    lines: list[str] = []
    for per_image in (denoising_bytes, likelihood_bytes):
        free(monkeypatch, room * per_image(model.config) / SHARE)
        shared = Batches(log=lines.append)
        if per_image is denoising_bytes:
            parts = Sampler(model, GUIDED, shared).draw(range(12))
            assert torch.equal(parts.images, whole.images)
            assert shared.used == {"sampling": 12, "denoising": taken}
        else:
            split = BitsPerDim(noise)
            split.add(model, pixels, labels, ids, shared)
            assert split.values == bits.values
            assert shared.used == {"likelihood": taken}
    said = [line.partition(" images at a time, by")[0] for line in lines]
    assert said == ([] if taken == 12 else [f"denoising: {taken} of 12", f"likelihood: {taken} of 12"])


def test_out_of_memory_halves_the_batch_once_says_so_and_changes_no_image(make_model, monkeypatch) -> None:
    model, lines = make_model(), list[str]()
    free(monkeypatch, None)
    whole = Sampler(model, GUIDED, Batches()).draw(range(8), with_trajectory=True)
    monkeypatch.setattr(draw, "invert", too_large(4, draw.invert, 1))
    monkeypatch.setattr(draw, "denoise", too_large(4, draw.denoise, 1))
    shared = Batches(log=lines.append)
    sampler = Sampler(model, GUIDED, shared)
    halved = sampler.draw(range(8), with_trajectory=True)
    assert torch.equal(halved.images, whole.images)
    assert all(map(torch.equal, halved.trajectory, whole.trajectory))
    assert [line.partition(" of 8 images")[0] for line in lines] == ["sampling", "denoising"]
    assert all("halved once, to 4" in line and "CUDA out of memory. Tried for 8" in line for line in lines)
    assert torch.equal(sampler.draw(range(8)).images, whole.images)
    assert len(lines) == 2, "the smaller batch holds from then on"
    assert shared.used == {"sampling": 4, "denoising": 4}


@pytest.mark.parametrize("allocator", ["device", "host"])
def test_what_does_not_fit_in_half_its_batch_names_the_setting(allocator: str) -> None:
    def compute(part: slice) -> int:
        if allocator == "host":
            torch.empty(1 << 50)  # what the CPU's own allocator raises
        raise torch.OutOfMemoryError("no")

    lines: list[str] = []
    with pytest.raises(
        EvaluationError, match=r"denoising of 8 images.*cpu, after.*halved once: set sampling.batch_size=4 or lower"
    ):
        Batches(log=lines.append).run("denoising", 16, compute)
    assert len(lines) == 1
    with pytest.raises(EvaluationError, match=r"sampling of 1 images at a time .* on a device with more memory"):
        Batches().run("sampling", 1, compute)


def test_an_error_that_is_not_of_memory_is_not_taken_for_one() -> None:
    def compute(_: slice) -> int:
        raise RuntimeError("shapes differ")

    shared = Batches(log=pytest.fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        shared.run("sampling", 4, compute)


def test_a_feature_network_that_does_not_fit_goes_on_in_halves(monkeypatch) -> None:
    network = Features("efficientnet_lite0")
    lines: list[str] = []
    network.batches.log = lines.append
    images = torch.arange(4 * 192).remainder(251).to(torch.uint8).view(4, 3, 8, 8)
    whole = network(images)
    monkeypatch.setattr(network, "_forward", too_large(2, network._forward, 0))
    torch.testing.assert_close(network(images), whole)
    assert network.batches.used == {"features": 2}
    assert len(lines) == 1


def test_the_next_worker_begins_with_the_half_that_worked_and_says_so(tmp_path: Path) -> None:
    note, lines = tmp_path / "evals" / "batches.json", list[str]()

    def worker(most: int) -> Batches:
        def compute(part: slice) -> None:
            if part.stop - part.start > most:
                raise torch.OutOfMemoryError(f"tried {part.stop - part.start}")

        lines.clear()
        batches = Batches(log=lines.append, note=note)
        batches.run("sampling", 16, compute)
        return batches

    assert worker(16).used == {"sampling": 16}
    assert not note.exists(), "nothing that had to be found out"
    assert worker(8).used == {"sampling": 8}
    assert worker(4).used == {"sampling": 4}, "each worker halves once"
    assert [line.partition(" (")[0] for line in lines] == [
        f"sampling: 8 of 16 images at a time, since more did not fit on the cpu of {platform.node()} before",
        "sampling of 8 images at a time does not fit into the memory of cpu: halved once, to 4, from here on",
    ]
    assert worker(4).used == {"sampling": 4}
    assert len(lines) == 1, "nothing had to be tried"
    assert f"({note} says so; remove it to try)" in lines[0]
    note.write_text(note.read_text().replace("4", "64"))
    assert worker(16).used == {"sampling": 16}, "of a damaged note nothing is taken"
    assert "is damaged or was not written by tarflow" in lines[0]
    note.unlink()
    note.mkdir()
    assert worker(8).used == {"sampling": 8}, "that it cannot be written ends no evaluation"
    assert "is not written" in lines[-1]


def test_likelihoods_of_every_image_and_the_python_interface_are_split_as_well(make_model, monkeypatch) -> None:
    model = make_model()
    pixels, labels, ids = torch.arange(8 * 64).remainder(256).to(torch.uint8).view(8, 1, 8, 8), torch.arange(8) % 3, torch.arange(8)  # fmt: skip
    noise = NoiseSettings("gaussian", 0.1, draws=2)
    flow = Flow(WeightsSource(model, "raw", "0" * 64, "here"), GUIDED, 8)
    measures: list[Callable[..., torch.Tensor]] = [flow.bits_per_dim, flow.log_prob, flow.encode, flow.denoise]
    free(monkeypatch, None)
    table = likelihoods(model, [(pixels, labels, ids)], noise)
    wholes = [measure(pixels, [1] * 8) for measure in measures]

    free(monkeypatch, 2 * likelihood_bytes(model.config) / SHARE)
    shared = Batches(log=lambda _: None)
    split = likelihoods(model, [(pixels, labels, ids)], noise, shared)
    assert shared.used == {"likelihood": 2}
    assert np.array_equal(split.bits, table.bits)
    assert np.array_equal(split.parts, table.parts)
    free(monkeypatch, 2 * denoising_bytes(model.config) / SHARE)
    flow._memory = Batches(log=lambda _: None)
    assert all(torch.equal(measure(pixels, [1] * 8), whole) for measure, whole in zip(measures, wholes))
    assert flow._memory.used["denoising"] == 2


@pytest.mark.usefixtures("fake_features")
def test_a_result_records_the_batches_and_is_the_same_result(make_run, monkeypatch) -> None:
    free(monkeypatch, None)

    original, _ = make_run(steps=(20,), sampling={"batch_size": 8})

    def scored(name: str) -> tuple[bytes, dict[str, Any]]:
        run_dir = shutil.copytree(original, original.with_name(name))
        assert evaluate(run_dir, False, WorkerOptions(), lines.append).failed == {}
        folder = run_dir / "evals" / "images-000000000320"
        return (folder / "result.json").read_bytes(), json.loads((folder / "work.json").read_text())

    lines: list[str] = []
    whole, work = scored("whole")
    assert not (original.with_name("whole") / "evals/batches.json").exists()
    assert work["batches"] == {"denoising": [8], "likelihood": [8], "sampling": [8]}
    monkeypatch.setattr(draw, "denoise", too_large(4, draw.denoise, 1))
    halved, work = scored("halved")
    assert work["batches"] == {"denoising": [4], "likelihood": [8], "sampling": [8]}
    assert halved == whole
    assert len([line for line in lines if "halved once" in line]) == 1
    noted = json.loads((original.with_name("halved") / "evals/batches.json").read_text())["devices"]
    assert noted == {f"the cpu of {platform.node()}": {"denoising": 4}}


COMMANDS: dict[str, Callable[[Path, Path, Callable[[str], None]], Any]] = {
    "sample": lambda run, out, log: sample_images(SampleRequest(source=run, out=out, num=8, batch_size=8), log),
    "likelihood": lambda run, out, log: measure_likelihoods(
        LikelihoodRequest(source=run, data=run / "val", out=out, num=8, batch_size=8), log
    ),
    "encode": lambda run, out, log: encode_images(
        EncodeRequest(source=run, data=run / "val", out=out, num=8, batch_size=8), log
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_go_by_the_note_of_evaluations_and_add_to_it(
    command, make_run, digit_like, tmp_path, monkeypatch
) -> None:
    run_dir, _ = make_run(steps=(20,))
    (run_dir / "val").symlink_to(digit_like / "val")
    free(monkeypatch, None)
    note, name = run_dir / "evals" / "batches.json", f"the cpu of {platform.node()}"
    stage = "denoising" if command == "sample" else "likelihood"

    def on_a_device_that_holds(most: int, out: str) -> list[str]:
        lines: list[str] = []
        with monkeypatch.context() as device:
            device.setattr(draw, "denoise", too_large(most, draw.denoise, 1))
            device.setattr(TarFlow, "patchify", too_large(most, TarFlow.patchify, 1))
            COMMANDS[command](run_dir, tmp_path / out, lines.append)
        return [line.partition(" (")[0] for line in lines if stage in line and "images at a time" in line]

    assert on_a_device_that_holds(8, "whole") == []
    assert not note.exists(), "nothing that had to be found out"
    halved = f"{stage} of 8 images at a time does not fit into the memory of cpu: halved once, to 4, from here on"
    assert on_a_device_that_holds(4, "halved") == [halved]
    assert json.loads(note.read_text())["devices"] == {name: {stage: 4}}
    told = f"{stage}: 4 of 8 images at a time, since more did not fit on {name} before"
    assert on_a_device_that_holds(8, "told") == [told]
    files = [sorted(p for p in (tmp_path / out).rglob("*.[pn]*") if p.suffix in (".png", ".parquet", ".npz")) for out in ("whole", "halved", "told")]  # fmt: skip
    for whole, *others in zip(*files, strict=True):
        assert all(other.read_bytes() == whole.read_bytes() for other in others), whole


def test_from_python_the_note_is_read_and_other_work_in_the_program_is_no_reason_to_add_to_it(
    make_run, monkeypatch
) -> None:
    run_dir, _ = make_run(steps=(20,))
    note = run_dir / "evals" / "batches.json"
    save_record(note, Fitted(devices={f"the cpu of {platform.node()}": {"denoising": 4}}))
    before = note.read_bytes()
    flow = tarflow.load(run_dir)
    flow.sample(8)
    assert flow._memory.used["denoising"] == 4
    monkeypatch.setattr(draw, "denoise", too_large(2, draw.denoise, 1))
    flow.sample(8)
    assert flow._memory.used["denoising"] == 2
    assert note.read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_torch_is_named_by_what_was_computed(command, make_run, digit_like, tmp_path, monkeypatch) -> None:
    run_dir, _ = make_run(steps=(20,))
    (run_dir / "val").symlink_to(digit_like / "val")

    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nstack")

    monkeypatch.setattr(draw, "denoise", broken)
    monkeypatch.setattr(TarFlow, "patchify", broken)
    doing = {"sample": "sampling", "encode": "encoding"}.get(command, command)
    with pytest.raises(EvaluationError, match=rf"^{doing}: RuntimeError on cpu: mat1 and mat2 .* multiplied$"):
        COMMANDS[command](run_dir, tmp_path / "out", lambda _: None)


@pytest.mark.usefixtures("fake_features")
def test_no_error_of_torch_ends_a_worker_without_its_cause(make_run, monkeypatch) -> None:
    """The first checkpoint fails in the middle; the second is scored. A device that failed ends the worker."""
    run_dir, _ = make_run()
    errors: list[Exception] = [RuntimeError("mat1 and mat2 shapes cannot be multiplied\nstack")]
    real = draw.denoise

    def failing(*args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(draw, "denoise", failing)
    outcome = evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    assert outcome.failed == {
        "images-000000000160": "evaluating images-000000000160: RuntimeError on cpu: mat1 and mat2 shapes cannot be multiplied"
    }
    assert [result["step"] for result in outcome.done] == [20]
    errors.append(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(
        DeviceFailedError, match=r"evaluating images-0+160: the device cpu failed .CUDA error: an illegal"
    ):
        evaluate(run_dir, False, WorkerOptions(), lambda _: None)


@pytest.mark.usefixtures("fake_features")
def test_the_batches_of_a_result_are_not_those_of_the_pictures_before_it(make_run) -> None:
    """Four images of the first result's trajectory are drawn at once; the second result's chunks take two."""
    run_dir, _ = make_run(sampling={"batch_size": 2})
    done = evaluate(run_dir, False, WorkerOptions(), lambda _: None).done
    assert [r["batches"] for r in done] == [{"denoising": [2], "likelihood": [2], "sampling": [2]}] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_batch_is_what_fits_and_a_full_device_halves_it(make_model, monkeypatch) -> None:
    """The cost model against the allocator's peak; then a device on which all but 0.3 GB and a few images is taken."""
    device = torch.device("cuda")
    shape = {"image_size": 64, "in_channels": 3, "channels": 512, "head_channels": 64, "layers_per_block": 4}
    model = make_model(moved=0.01, **shape).requires_grad_(False).to(device)
    per_image = denoising_bytes(model.config)

    def drawn(shared: Batches, count: int) -> torch.Tensor:
        return Sampler(model, GUIDED, shared).draw(range(count)).images

    def peak(count: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = torch.zeros(count, dtype=torch.int64, device=device)
        draw.denoise(model, torch.zeros(count, 3, 64, 64, device=device), y, 0.1)
        return torch.cuda.max_memory_allocated() - before

    assert (peak(48) - peak(16)) / 32 == pytest.approx(per_image, rel=0.2)
    whole = drawn(Batches(device), 64)
    torch.cuda.empty_cache()
    taken = torch.empty(int(torch.cuda.mem_get_info()[0] - 0.3e9 - 40 * per_image), dtype=torch.uint8, device=device)
    lines: list[str] = []
    fitting = Batches(device, lines.append)
    torch.testing.assert_close(drawn(fitting, 64), whole, rtol=0, atol=1e-4)
    assert fitting.used["denoising"] == 32
    free(monkeypatch, None)  # nobody tells: the allocator does
    told = Batches(device, lines.append)
    torch.testing.assert_close(drawn(told, 64), whole, rtol=0, atol=1e-4)
    assert told.used["denoising"] == 32
    assert len([line for line in lines if "denoising" in line]) == 2
    del taken
