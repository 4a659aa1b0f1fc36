"""A job runs what lies in RUN/slurm: nothing is submitted from a folder that others can change."""

import os
from pathlib import Path

import pytest

from tarflow.cluster.errors import ClusterError


@pytest.mark.parametrize("words", [["submit", "CONFIG", "--run"], ["submit-eval"]], ids=["submit", "submit-eval"])
@pytest.mark.parametrize(
    "fault", ["link", "jobs link", "everyone", "jobs everyone", "another user", "log link", "file"]
)
@pytest.mark.case("H01")
def test_a_folder_that_others_can_change_is_refused(
    fault: str, words: list[str], fake_slurm, verb, config_file, tmp_path: Path
) -> None:
    from tarflow.trainer.run_dir import create_run

    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    create_run(run)
    (run / "slurm" / "jobs").mkdir(parents=True)
    elsewhere.mkdir()
    place = run / "slurm" / ("jobs" if fault.startswith("jobs") else "")
    if fault.endswith("link") and fault != "log link":
        (run / "slurm" / "jobs").rmdir()
        if place.name == "slurm":
            place.rmdir()
        place.symlink_to(elsewhere)
    elif fault.endswith("everyone"):
        place.chmod(0o777)
    elif fault == "another user":
        if os.getuid() != 0:
            pytest.fail("this suite runs as root")
        os.chown(place, 4711, 4711)
    elif fault == "log link":
        (run / "slurm" / "jobs" / "107_0_log.out").symlink_to(tmp_path / "precious")
    else:
        (run / "slurm" / "jobs").rmdir()
        (run / "slurm" / "jobs").write_text("")
    line = [str(config_file) if word == "CONFIG" else word for word in words]
    with pytest.raises(ClusterError, match=r"slurm"):
        verb(*line, run)
    assert fake_slurm.calls("sbatch") == []
    assert list(elsewhere.iterdir()) == []
    assert not (tmp_path / "precious").exists()
