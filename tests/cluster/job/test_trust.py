"""What lies in a run directory was put there by anyone: jobs obey only what was submitted, and end where it is damaged."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.cancel_note import is_cancelled, leave_note
from tarflow.cluster.job.chain import Chain, ChainFile, Limits
from tarflow.cluster.job.description import Job, load_job, save_description
from tarflow.cluster.job.failure_notes import FailureNote, read_failure
from tarflow.cluster.job.preflight import Here
from tarflow.cluster.job.record import JobLine, submissions
from tarflow.cluster.job.rendezvous import MeetingFile
from tarflow.files import append_line
from tarflow.records import DamagedFileError, append_record_line, load_record, save_record
from tests.helpers.waiting import until

SUBMISSION = "0123456789abcdef" * 2


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def submitted(fake, fake_slurm, verb, config_file, plain, tmp_path) -> Callable[..., Path]:
    """A submitted run whose training is the stub."""

    def make(*words: object) -> Path:
        run = tmp_path / "run"
        assert verb("submit", config_file, "--run", run, "--tasks-per-node", 1, "--profile", plain, *words) == 0
        fake.use_stub(run)
        return run

    return make


def flips(data: bytes, step: int = 1) -> Iterator[bytes]:
    """The content with one bit changed, cut short, and with things in it that nobody wrote."""
    for at in range(0, len(data), step):
        yield data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
    for at in range(0, len(data), 7 * step):
        yield data[:at]
    yield from (b"[]", b"null", b"{}" + data, b"[" * 10_000, b"\xff\xfe", data.replace(b": ", b": 1e999, ", 1))


def job(run_dir: Path, **changes: object) -> Job:
    facts = {
        "kind": "train", "run_dir": str(run_dir), "run": "r", "submission": SUBMISSION, "code": "/code", "arguments": ("train",),
        "resubmit": "tarflow submit", "limits": Limits(3, 3),
    }  # fmt: skip
    return Job.model_validate(facts | changes)


@pytest.mark.case("H01")
def test_no_file_of_a_strangers_run_runs_code(submitted, fake, fake_slurm, verb, config_file, plain, tmp_path) -> None:
    """Pickles where submitit had them, a snapshot under the very name of ours, its compiled files, links."""
    mark = tmp_path / "mark"
    run = submitted()
    (code,) = (run / "slurm").glob("code-*")
    jobs = run / "slurm" / "jobs"
    for name in ("107_submitted.pkl", "107_0_result.pkl", "108_submitted.pkl", "108_0_result.pkl"):
        (jobs / name).write_bytes(pickle.dumps(Evil(mark)))
    for path in [*code.rglob("*.py")][:200]:
        path.write_text(f"open({str(mark)!r}, 'w')\n{path.read_text()}")
    (code / "sitecustomize.py").write_text(f"open({str(mark)!r}, 'w')\n")
    fake_slurm.command("squeue", "exit 0")
    stranger = tmp_path / "strangers"
    shutil.copytree(run, stranger, symlinks=True)
    assert verb("status", stranger) == 0
    with pytest.raises(ClusterError, match="has not started"):
        verb("logs", stranger)
    assert verb("cancel", stranger) == 0
    assert verb("submit", config_file, "--run", stranger, "--profile", plain) == 0
    (fresh,) = {*(stranger / "slurm").glob("code-*")} - {stranger / "slurm" / code.name}
    fake.use_stub(stranger)
    shutil.copy(Path(fake.__file__).with_name("stub_tarflow.py"), fresh / "tarflow" / "__main__.py")
    assert fake_slurm.run(job=108, STUB="fail") == 75
    assert fake_slurm.run(job=108, restart=1, STUB="finish") == 0
    assert not mark.exists()


@pytest.mark.case("H01")
def test_compiled_files_that_came_with_a_snapshot_are_not_used(submitted, verb, config_file, plain, tmp_path) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        assert verb("submit", config_file, "--run", run, "--profile", plain) == 0
        (code,) = (run / "slurm").glob("code-*")
        cache = code / "tarflow" / "__pycache__"
        assert not cache.exists()
        cache.mkdir()
        (cache / "cli.cpython-311.pyc").write_bytes(b"anything")
    (code / "tarflow" / "more.py").symlink_to("/dev/null")
    assert verb("submit", config_file, "--run", run, "--profile", plain) == 0
    assert len(list((run / "slurm").glob("code-*"))) == 2, "another copy, and the old one stays for who runs it"


@pytest.mark.case("H01")
def test_a_job_does_what_was_submitted_or_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = run / "slurm" / "jobs" / "job-x.json"
    digest = save_description(path, (job(run), job(run, arguments=("other",))))
    assert load_job(path, digest, {"SLURM_ARRAY_TASK_ID": "1"}).arguments == ("other",)
    with pytest.raises(ClusterError, match="describes 2 elements, and this is element 2"):
        load_job(path, digest, {"SLURM_ARRAY_TASK_ID": "2"})
    data = path.read_bytes()
    for changed in flips(data, step=5):
        path.write_bytes(changed)
        with pytest.raises(DamagedFileError, match="not what was submitted"):
            load_job(path, digest, {})
    save_description(path, (job(run, arguments=("evil",)),))  # sound in itself
    with pytest.raises(DamagedFileError, match=r"not what was submitted.*; submit the run again"):
        load_job(path, digest, {})
    path.unlink()
    with pytest.raises(ClusterError, match="is not there"):
        load_job(path, digest, {}, wait_s=0)
    elsewhere = tmp_path / "copy" / "slurm" / "jobs" / "job-x.json"
    digest = save_description(elsewhere, (job(run),))
    with pytest.raises(ClusterError, match="the run was moved; submit again"):
        load_job(elsewhere, digest, {})


@pytest.mark.case("H01")
def test_a_changed_description_ends_the_job_without_a_start(submitted, fake, fake_slurm) -> None:
    run = submitted()
    (path,) = (run / "slurm" / "jobs").glob("job-*.json")
    path.write_text(path.read_text().replace('"preflight": "off"', '"preflight": "full"'))
    assert fake_slurm.run(STUB="finish") == 2
    assert fake.stub_calls(run) == []
    assert "this job cannot begin: " in fake.said(run)
    assert "Traceback" not in fake.said(run) + (run / "slurm" / "jobs" / "107_0_log.err").read_text()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "list", "other job", "other submission", "directory"])
@pytest.mark.case("H06")
def test_a_chain_that_cannot_be_believed_ends_the_job_and_stays(submitted, fake, fake_slurm, damage: str) -> None:
    run = submitted()
    assert fake_slurm.run(STUB="fail,finish") == 75
    path = run / "slurm" / "chain-107.json"
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data.replace(b'"restart": 0', b'"restart": 1'))
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage in ("empty", "list"):
        path.write_bytes(b"" if damage == "empty" else b"[1]")
    elif damage == "other job":
        chain = load_record(path, ChainFile)
        save_record(path, chain.model_copy(update={"job": "999"}))
    elif damage == "other submission":
        save_record(path, load_record(path, ChainFile).model_copy(update={"submission": "f" * 32}))
    else:
        path.unlink()
        path.mkdir()
    before = path.read_bytes() if path.is_file() else None
    assert fake_slurm.run(restart=1, STUB="fail,finish") == 1
    assert len(fake.stub_calls(run)) == 1, "nothing was started"
    assert len(fake_slurm.requeues()) == 1, "nor asked of Slurm"
    assert (path.read_bytes() if path.is_file() else None) == before
    said = fake.said(run)
    assert f"stopped, and not requeued: {path} (record of the starts of a Slurm job) is damaged" in said
    assert "move the file away and submit the run again. Then go on with:" in said
    assert "tarflow submit" in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("damage", ["other run", "flipped", "gone"])
@pytest.mark.case("H02")
def test_a_directory_that_holds_no_longer_the_run_ends_the_job(submitted, fake, fake_slurm, damage: str) -> None:
    from tarflow.trainer.run_dir import create_run

    run = submitted()
    assert fake_slurm.run(STUB="fail,finish") == 75
    path = run / "run.json"
    if damage == "flipped":
        data = path.read_text()
        at = data.index('"run_id": "') + 15
        path.write_text(data[:at] + ("0" if data[at] != "0" else "1") + data[at + 1 :])
    else:
        path.unlink()
    if damage == "other run":
        create_run(run.parent / "other")
        (run.parent / "other" / "run.json").rename(path)
    assert fake_slurm.run(restart=1, STUB="fail,finish") == 1
    assert len(fake.stub_calls(run)) == 1, "nothing was started"
    assert len(fake_slurm.requeues()) == 1
    assert "stopped, and not requeued: " in fake.said(run).splitlines()[-1]
    assert str(run) in fake.said(run).splitlines()[-1]
    assert fake.chain(run)["ended"]["code"] == 1
    assert "Traceback" not in fake.said(run)


@pytest.mark.case("H06")
def test_a_chain_that_is_damaged_meanwhile_is_no_lost_job(submitted, fake, fake_slurm) -> None:
    run = submitted()
    running = fake_slurm.start(STUB="wait")
    until("the training", lambda: fake.stub_calls(run))
    path = run / "slurm" / "chain-107.json"
    path.write_bytes(path.read_bytes()[:40])
    os.kill(fake_slurm.task_pids()[0], signal.SIGUSR2)
    assert running.wait(60) == 75
    assert fake_slurm.requeues() == ["requeue 107"]
    assert [start["restart"] for start in fake.chain(run)["starts"]] == [0]
    assert "rewritten" in fake.said(run)


@pytest.mark.case("H06")
def test_every_small_file_of_a_job_is_believed_whole_or_not_at_all(tmp_path: Path) -> None:
    start, end = (
        {"restart": 1, "step": 40, "nodes": "n[1-2]", "time": 1.5},
        {"code": 76, "text": "no progress", "time": 2.0},
    )
    files = {
        "chain": ChainFile.model_validate({"job": "107", "submission": SUBMISSION, "starts": [start], "ended": end}),
        "meeting": MeetingFile(host="10.0.0.1", check_port=4000, port=4001),
        "here": Here(rank=1, node="n1", time=12.5),
        "failure": FailureNote(code=137, text="rank 1 on n1: killed", node="n1"),
    }
    for name, record in files.items():
        path = tmp_path / name
        save_record(path, record)
        for changed in flips(path.read_bytes()):
            path.write_bytes(changed)
            try:
                found = load_record(path, type(record))
            except DamagedFileError:
                continue
            assert found == record


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (MeetingFile, {"host": "a;b"}), (MeetingFile, {"host": ""}), (MeetingFile, {"port": 70000}), (MeetingFile, {"port": 0}),
        (Here, {"rank": -1}), (Here, {"time": -1.0}), (FailureNote, {"node": "n1,n2"}), (FailureNote, {"node": "n1 x"}),
        (FailureNote, {"code": 256}), (JobLine, {"job": "../7"}), (JobLine, {"job": "7;x"}), (JobLine, {"kind": "other"}),
        (JobLine, {"ranks_per_task": 0}), (JobLine, {"time": 1e300}), (JobLine, {"job": "107\n"}),
    ],
)  # fmt: skip
@pytest.mark.case("H06")
def test_bounds_of_what_is_used_further(kind, changes: dict[str, object]) -> None:
    sound: dict[Any, dict[str, Any]] = {
        MeetingFile: {"host": "n1", "check_port": 1, "port": 1}, Here: {"rank": 0, "node": "n", "time": 0.0},
        FailureNote: {"code": 1}, JobLine: {"job": "7_1", "kind": "train"},
    }  # fmt: skip
    kind.model_validate(sound[kind])
    with pytest.raises(ValueError, match="validation error"):
        kind.model_validate(sound[kind] | changes)


@pytest.mark.case("H06")
def test_a_note_of_a_failure_counts_whatever_is_left_of_it(tmp_path: Path) -> None:
    path = tmp_path / "failed-1.json"
    path.write_bytes(b'{"code": 13')
    assert read_failure(path).code == 1
    assert "cannot be read" in read_failure(path).text


def test_a_note_of_a_cancellation_is_for_one_submission(tmp_path: Path) -> None:
    assert not is_cancelled(tmp_path, "107", SUBMISSION)
    leave_note(tmp_path, "107", "f" * 32)
    assert not is_cancelled(tmp_path, "107", SUBMISSION), "a number that another job had"
    (tmp_path / "cancel-107").write_bytes(b"")
    assert not is_cancelled(tmp_path, "107", SUBMISSION)
    leave_note(tmp_path, "107", SUBMISSION)
    assert is_cancelled(tmp_path, "107", SUBMISSION)


@pytest.mark.case("H05")
def test_a_line_that_cannot_be_believed_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "slurm" / "jobs.jsonl"
    path.parent.mkdir()
    assert submissions(tmp_path).checked().entries == []
    append_record_line(path, {"job": "107", "kind": "train", "time": 1.0})
    append_record_line(path, {"job": "108", "kind": "train", "time": 1.0})
    data = path.read_bytes()
    first, second = data.splitlines(keepends=True)
    for changed in flips(first.rstrip(b"\n")):
        if b"\n" in changed:
            continue
        path.write_bytes(changed + b"\n" + second)
        found = submissions(tmp_path)
        jobs = [entry["job"] for entry in found.entries]
        assert jobs == ["107", "108"] or (jobs == ["108"] and found.problem) or not changed
    path.write_bytes(data[:-20])
    assert [entry["job"] for entry in submissions(tmp_path).entries] == ["107"]
    with pytest.raises(DamagedFileError, match=r"has no end.*squeue --me"):
        submissions(tmp_path).checked()
    path.write_bytes(data)
    append_line(path, json.dumps({"job": "109", "kind": "train"}))
    with pytest.raises(DamagedFileError, match=r"1 damaged line"):
        submissions(tmp_path).checked()
    path.write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"it is empty.*squeue --me.*or the file if it is empty"):
        submissions(tmp_path).checked()
    append_line(path, json.dumps({"job": "110", "kind": "train", "more\x1b[31m": 1}))
    assert "\\x1b[31m" in submissions(tmp_path).problem, "not a colour of the terminal's"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedFileError, match="it is a link"):
        submissions(tmp_path).checked()
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedFileError, match="not a regular file"):
        submissions(tmp_path).checked()


@pytest.mark.case("H05")
def test_jobs_of_another_run_are_not_this_runs(tmp_path: Path) -> None:
    from tarflow.trainer.run_dir import create_run, run_id

    create_run(tmp_path)
    (tmp_path / "slurm").mkdir()
    append_record_line(tmp_path / "slurm" / "jobs.jsonl", {"job": "107", "kind": "train", "run": run_id(tmp_path)})
    append_record_line(tmp_path / "slurm" / "jobs.jsonl", {"job": "108", "kind": "train", "run": "f" * 32})
    assert [entry["job"] for entry in submissions(tmp_path).entries] == ["107"]
    with pytest.raises(
        DamagedFileError, match=r"job '108': it belongs to the run ffff|job 108: it belongs to the run ffff"
    ):
        submissions(tmp_path).checked()


@pytest.mark.case("H05")
def test_a_submission_is_refused_while_a_job_may_be_unknown(submitted, fake_slurm, verb, config_file, plain) -> None:
    run = submitted()
    path = run / "slurm" / "jobs.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"job": "107"', b'"job": "187"'))
    before = path.read_bytes()
    for words in (["submit", config_file, "--run", run, "--profile", plain], ["submit-eval", run, "--profile", plain]):
        with pytest.raises(DamagedFileError, match=r"1 damaged line left out .*squeue --me"):
            verb(*words)
    assert path.read_bytes() == before
    assert len(fake_slurm.calls("sbatch")) == 1


def test_an_evaluation_goes_on_while_the_record_of_its_training_cannot_be_read(tmp_path: Path) -> None:
    """It ends by its own bounds; that a training is over is nothing to be guessed."""
    from tarflow.cluster.job.record import Followed

    slurm_dir = tmp_path / "slurm"
    slurm_dir.mkdir()
    append_record_line(slurm_dir / "jobs.jsonl", {"job": "107", "kind": "train"})
    Chain.load(slurm_dir, "107").end(78, "stopped: requeue limit")
    assert "requeue limit" in Followed(slurm_dir, "107").ended_early()
    path = slurm_dir / "chain-107.json"
    path.write_bytes(path.read_bytes()[:30])
    assert Followed(slurm_dir, "107").ended_early() == ""
