"""One worker per device: each its own device and the words that were typed; the work is shared, and nobody is left behind."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import tarflow.cli
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.start import processes
from tarflow.evaluation.start.processes import Devices, run_workers
from tarflow.interpreter import child_environment
from tests.helpers.programs import program
from tests.helpers.waiting import until
from tests.helpers.warm import warm


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Workers are a small program; how each ends is said in a file."""

    def command(_module: str, *words: str, unbuffered: bool = False) -> list[str]:
        assert unbuffered
        return [*program("evaluation_worker"), str(tmp_path), *words]

    monkeypatch.setattr(processes, "module_command", command)
    return tmp_path


def seen(folder: Path) -> dict[str, list[str]]:
    return {p.name.removeprefix("seen-"): json.loads(p.read_text())["words"] for p in folder.glob("seen-*")}


def devices(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("count", "visible", "names"),
    [(3, None, ["0", "1", "2"]), (2, "5,7", ["5", "7"]), (2, "GPU-8f2a, GPU-11ce", ["GPU-8f2a", "GPU-11ce"])],
)
def test_auto_starts_one_worker_per_visible_device_with_the_words_that_were_typed(
    stub: Path, monkeypatch, capfd, count: int, visible: str | None, names: list[str]
) -> None:
    devices(monkeypatch, count, visible)
    words = ["sampling.guidance=2", "--watch", "--poll", "7.5", "--save", "png", "--workers", "auto", "--threads", "3"]
    assert tarflow.cli.main(["evaluate", "runs/a", *words]) == 0
    same = ["evaluate", "runs/a", "sampling.guidance=2", "--save", "png", "--watch", "--poll", "7.5", "--threads", "3"]
    assert seen(stub) == dict.fromkeys(names, same)
    out, err = capfd.readouterr()
    assert f"{count} workers on {', '.join(names)}\n" in out
    assert {f"worker {n}: at work on {name}" for n, name in enumerate(names)} <= set(out.splitlines())
    assert err.splitlines() == [f"worker {line[7]}: a last line" for line in err.splitlines()]


@pytest.mark.parametrize(("threads", "omp", "given"), [(None, None, True), (None, "2", False), (5, "2", True)])
def test_processors_are_shared_out_unless_somebody_has_done_it(
    stub: Path, monkeypatch, threads: int | None, omp: str | None, given: bool
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    assert run_workers(["runs/a"], 2, Devices(2, ("0", "1")), threads, print) == 0
    assert seen(stub)["1"] == ["evaluate", "runs/a", *(["--threads", str(threads or 4)] if given else [])]


def test_on_a_cpu_auto_is_one_and_a_number_is_that_many(monkeypatch) -> None:
    devices(monkeypatch, 0, None)
    found = Devices.found("auto")
    assert (found.workers("auto"), found.workers("3"), found.environment(1)) == (1, 3, {})
    devices(monkeypatch, 4, None)
    assert Devices.found("cpu").workers("auto") == 1
    assert Devices.found("cuda").workers("auto") == 4
    devices(monkeypatch, 0, "0,1")  # a share of a cluster's devices by name, which this torch cannot use
    assert [Devices.found("auto").environment(n) for n in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}, {},
    ]  # fmt: skip


@pytest.mark.parametrize("asked", ["3", "0", "-1", "two", "1025"])
def test_more_workers_than_devices_and_numbers_that_are_none_are_refused(
    stub: Path, monkeypatch, capsys, asked
) -> None:
    devices(monkeypatch, 2, "4,6")
    with pytest.raises(EvaluationError, match=f"--workers {asked}"):
        Devices.found("auto").workers(asked)
    assert tarflow.cli.main(["evaluate", "runs/a", f"--workers={asked}"]) == 2
    assert seen(stub) == {}
    if asked == "3":
        assert "2 of this machine's devices are visible (CUDA_VISIBLE_DEVICES=4,6)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ({"0": "killed"}, 0, "worker 0 was killed by SIGKILL: "),
        ({"0": "1"}, 1, "worker 0 ended with exit code 1"),
        ({"0": "killed", "1": "killed"}, 1, "start the command again for what is missing"),
        ({"0": "2", "1": "2"}, 2, "worker 1 ended with exit code 2"),
    ],
)
def test_one_that_dies_is_told_and_the_others_go_on(stub: Path, ends: dict[str, str], code: int, said: str) -> None:
    for device, what in ends.items():
        (stub / f"end-{device}").write_text(what)
    lines: list[str] = []
    assert run_workers(["runs/a"], 2, Devices(2, ("0", "1")), 1, lines.append) == code
    assert any(line.startswith(said) or line.endswith(said) for line in lines)
    assert set(seen(stub)) == {"0", "1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL])
def test_no_worker_outlives_the_one_that_started_it(stub: Path, number: signal.Signals) -> None:
    for device in ("0", "1"):
        (stub / f"end-{device}").write_text("wait")
    words = warm("tests.helpers.programs.start_workers", stub, *program("evaluation_worker"))
    parent = subprocess.Popen(words, env=child_environment())
    try:
        until("both workers", lambda: len(list(stub.glob("seen-?"))) == 2)
        pids = [json.loads(p.read_text())["pid"] for p in stub.glob("seen-?")]
        parent.send_signal(number)
        code = parent.wait(60)
        assert code == (-number if number == signal.SIGKILL else 128 + number)
        until("the end of the workers", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    finally:
        parent.kill()
        parent.wait()


def test_two_real_workers_write_the_result_that_one_writes(make_run, monkeypatch, capfd) -> None:
    """With nothing replaced but the cold start of their interpreters."""
    monkeypatch.setattr(processes, "module_command", lambda module, *words, unbuffered: warm(module, *words))
    run_dir, _ = make_run(steps=(20,), evaluation={"num_samples": 24, "chunk_samples": 4})
    alone = shutil.copytree(run_dir, run_dir.with_name("alone"))
    assert tarflow.cli.main(["evaluate", str(alone), "--threads", "1"]) == 0
    shutil.copytree(alone / "evals", run_dir / "evals", ignore=lambda *_: ["images-000000000320"])  # the reference
    assert tarflow.cli.main(["evaluate", str(run_dir), "--workers", "2", "--threads", "1"]) == 0
    ours, theirs = (folder / "evals" / "images-000000000320" for folder in (run_dir, alone))
    assert (ours / "result.json").read_bytes() == (theirs / "result.json").read_bytes()
    assert len((run_dir / "evals.jsonl").read_text().splitlines()) == 1
    work: dict[str, Any] = json.loads((ours / "work.json").read_text())
    assert len([chunk for chunks in work["workers"].values() for chunk in chunks]) == 9
    assert not any(name.endswith(f":{os.getpid()}") for name in work["workers"])
    out = capfd.readouterr().out
    assert "worker 0: evaluating" in out
    assert "worker 1: evaluating" in out
