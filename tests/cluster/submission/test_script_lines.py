"""The batch script holds the lines that are meant: what a name or a value holds is quoted there, or refused."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.batch import make_batch
from tarflow.cluster.submission.profile import ClusterProfile, load_profile

BREAKS = ["\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\x1b[2J", "\u202e", "\x00"]
HARMLESS = [
    "a b",
    "it's",
    'say "so"',
    "$(touch {mark})",
    "`touch {mark}`",
    "; touch {mark};",
    "50%",
    "#SBATCH --uid=0",
    "ü 猫",
]


def script(tree: dict, run: Path = Path("/runs/a"), code: str = "/code", description: str = "/d.json") -> list[str]:
    batch = make_batch(ClusterProfile.model_validate(tree), run, "tarflow-a", 1, 1, 1, dry_run=True)
    return batch.text(1, code, description, "0" * 64).split("\n")


def profile_file(tmp_path: Path, tree: dict) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def settings(value: str) -> list[dict]:
    return [
        {"partition": value}, {"account": value}, {"qos": value}, {"constraint": value}, {"exclude": value},
        {"container": value}, {"python": value}, {"srun": [value]}, {"sbatch": {"comment": value}},
    ]  # fmt: skip


@pytest.mark.parametrize("mark", BREAKS, ids=repr)
@pytest.mark.case("H11")
def test_a_value_that_would_begin_a_line_is_refused(mark: str, tmp_path: Path) -> None:
    for tree in [*settings(f"x{mark}touch /tmp/x"), {"sbatch": {f"comment{mark}touch": "x"}}]:
        with pytest.raises(ClusterError, match=r"p\.yaml: ") as caught:
            load_profile(profile_file(tmp_path, tree))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("mark", BREAKS, ids=repr)
@pytest.mark.case("H11")
def test_so_is_what_came_by_another_way(mark: str) -> None:
    with pytest.raises(ClusterError, match="folder of the batch script"):
        script({}, run=Path(f"/runs/a{mark}b"))
    with pytest.raises(ClusterError, match="setup of the batch script"):
        script({}, code=f"/code{mark}b")
    with pytest.raises(ClusterError, match="command of the batch script"):
        script({}, description=f"/d{mark}b")


@pytest.mark.parametrize("value", HARMLESS)
@pytest.mark.case("H11")
def test_what_is_harmless_arrives_as_it_is_and_changes_no_other_line(value: str, tmp_path: Path) -> None:
    value = value.format(mark=tmp_path / "mark")
    plain = script({"partition": "x", "account": "x", "sbatch": {"comment": "x"}, "srun": ["--x"], "python": "/py"})
    tree = {"partition": value, "account": value, "sbatch": {"comment": value}, "srun": [value], "python": value}
    found = script(tree)
    assert len(found) == len(plain)
    changed = {a: b for a, b in zip(plain, found) if a != b}
    assert [line.split("=")[0].split(" --")[0] for line in changed] == ["#SBATCH"] * 3 + ["srun"]
    for before, after in list(changed.items())[:3]:
        assert shlex.split(after, comments=False)[1] == before.split(" ")[1].replace("=x", f"={value}")
    command = shlex.split(changed[plain[-2]])
    assert value in command[command.index("--open-mode=append") + 1 :]
    assert command[-6:] == [value, "-P", "-u", "-m", "tarflow.cluster.job", "/d.json", "0" * 64][-6:]


@pytest.mark.case("H11")
def test_the_shell_runs_nothing_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{tmp_path}/words"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    evil = f"$(touch {tmp_path}/mark) `touch {tmp_path}/mark`; touch {tmp_path}/mark #'\""
    tree = {"partition": evil, "sbatch": {"comment": evil}, "srun": [evil], "python": evil}
    text = "\n".join(script(tree, run=Path(f"/runs/{evil}"), code=evil, description=evil))
    done = subprocess.run(
        ["/bin/bash"], input=text, env={"PATH": f"{tmp_path}/bin:/bin:/usr/bin"}, text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "mark").exists()
    words = (tmp_path / "words").read_text().splitlines()
    assert words.count(evil) == 3
    assert words[words.index("--output") + 1] == f"/runs/{evil}/slurm/jobs/%j_%t_log.out"


@pytest.mark.case("H11")
def test_lines_of_setup_are_lines_and_no_options_of_sbatch(tmp_path: Path) -> None:
    tree = {"setup": ["module purge", "if true; then\n\texport A=1\nfi\n"]}
    found = script({"setup": tuple(load_profile(profile_file(tmp_path, tree)).setup)})
    at = found.index("# setup")
    assert found[at + 1 : at + 6] == ["module purge", "if true; then", "\texport A=1", "fi", "export PYTHONSAFEPATH=1"]
    for line in ("#SBATCH --uid=0", "true\n#SBATCH --output=/x"):
        with pytest.raises(ClusterError, match="options of sbatch go into `sbatch`"):
            load_profile(profile_file(tmp_path, {"setup": [line]}))
