"""Nothing is written through a planted link: the tools, private folders, and the sources, which use them."""

import ast
import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tarflow.errors import UserError, in_words
from tarflow.file_systems import private_folder
from tarflow.files import (
    LineWriter,
    append_line,
    create,
    discard,
    fill,
    make_folder,
    open_own,
    put_once,
    write_json,
    write_new,
    write_text,
)
from tarflow.leases import leased, locked, sign
from tarflow.records import append_record_line
from tests.helpers.programs import ENV, program

ROOT = Path(__file__).resolve().parent.parent
PRECIOUS = "what must stay\n"


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file that nobody means to write; it is as it was afterwards."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path = folder / "precious"
    path.write_text(PRECIOUS)
    yield path
    assert path.read_text() == PRECIOUS
    assert [p.name for p in folder.iterdir()] == ["precious"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


REPLACED: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, "new"),
    "new": lambda path: write_new(path, "new"),
    "descriptor": lambda path: os.close(create(path)),
}
REFUSED: dict[str, Callable[[Path], object]] = {
    "line": lambda path: append_line(path, "new"),
    "record line": lambda path: append_record_line(path, {}),
    "lines": lambda path: LineWriter(path),
    "in place": lambda path: fill(path, "new"),
    "lock": lambda path: locked(path).__enter__(),
    "folder": lambda path: make_folder(path.parent, path.name),
    "folder in it": lambda path: make_folder(path.parent, path.name, "more"),
    "read own": lambda path: open_own(path, os.O_RDONLY),
}
links = pytest.mark.parametrize("target", ["precious", "nothing", "folder"])


def plant(name: Path, precious: Path, target: str) -> None:
    name.symlink_to({"precious": precious, "nothing": precious.with_name("new"), "folder": precious.parent}[target])


@links
@pytest.mark.parametrize("write", REPLACED.values(), ids=REPLACED.keys())
@pytest.mark.case("H07")
def test_a_link_gives_way_to_the_file_that_is_written(here: Path, precious: Path, write, target: str) -> None:
    plant(here / "a", precious, target)
    write(here / "a")
    assert not (here / "a").is_symlink()
    assert [path.name for path in here.iterdir()] == ["a"]


@links
@pytest.mark.parametrize("write", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.case("H07")
def test_a_link_is_an_error_where_a_file_is_added_to(here: Path, precious: Path, write, target: str) -> None:
    plant(here / "a", precious, target)
    with pytest.raises(OSError) as caught:
        write(here / "a")
    assert caught.value.errno == errno.ELOOP
    assert in_words(caught.value).startswith(f"{here / 'a'}: it is a link")


@links
@pytest.mark.case("H07")
def test_a_temporary_name_that_is_known_before_is_no_way_in(here: Path, precious: Path, target: str) -> None:
    """A file with one writer has one temporary name, which a kill may leave and anyone can guess."""
    plant(here / ".a.tmp", precious, target)
    write_text(here / "a", "new")
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("a", "new")]
    (here / ".a.tmp").write_text("left by a kill, and longer")
    write_text(here / "a", "newer")
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("a", "newer")]


@links
@pytest.mark.case("H07")
def test_links_are_removed_and_not_what_they_lead_to(here: Path, precious: Path, target: str) -> None:
    plant(here / "a", precious, target)
    assert discard(here / "a") is None
    (here / "b" / "c").mkdir(parents=True)
    plant(here / "b" / "c" / "d", precious, target)
    assert discard(here / "b") is None
    assert list(here.iterdir()) == []


@links
@pytest.mark.case("H07")
def test_a_file_is_put_once_beside_a_link(here: Path, precious: Path, target: str) -> None:
    plant(here / "a", precious, target)
    write_new(here / ".a.tmp", "new")
    put_once(here / ".a.tmp", here / "a")
    assert (here / "a").is_symlink(), "there was one: it stays, and nothing is written"


@pytest.mark.case("H07")
def test_locks_and_leases_of_pipes_and_links_do_not_wait(here: Path, precious: Path) -> None:
    os.mkfifo(here / "lock")
    with pytest.raises(OSError, match="No such device") as caught:
        locked(here / "lock").__enter__()
    assert "a pipe or a device" in in_words(caught.value)
    os.mkfifo(here / "name.0")
    with pytest.raises(OSError, match="No such device"):
        leased(here, "name", 60).__enter__()
    (here / "other.0").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        leased(here, "other", 60).__enter__()
    sign(here / "other.0")


def test_folders_on_the_way_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    run = tmp_path / "run"
    append_line(make_folder(run, "logs") / "a", "line")
    write_text(run / "b", "text")
    with locked(run / "lock") as mine:
        assert mine
    assert {path.name for path in (tmp_path / "scratch").iterdir()} == {"logs", "b"}


# --- a private folder ------------------------------------------------------------------------------------------------

OTHER = 12345  # another user's number
needs_root = os.geteuid() == 0


@pytest.mark.case("H07")
def test_a_private_folder_is_closed_to_others(tmp_path: Path) -> None:
    """Really, where this process may change its user; else by the mode, which is what decides."""
    os.chmod(tmp_path, 0o1777)
    for parent in list(tmp_path.parents)[:2]:  # pytest's own folders are private: opened for this test
        os.chmod(parent, 0o755)
    old = os.umask(0)
    try:
        folder = private_folder(tmp_path / "cache", "way out")
    finally:
        os.umask(old)
    (folder / "file").write_text("x")
    assert folder.stat().st_mode & 0o777 == 0o700
    if needs_root:
        done = subprocess.run(program("try_as_other", folder), env=ENV, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["PermissionError"] * 5, done.stderr
    assert private_folder(folder, "way out") == folder


@pytest.mark.case("H07")
def test_a_folder_that_someone_else_made_first_is_refused(tmp_path: Path, monkeypatch) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    if needs_root:
        os.chown(theirs, OTHER, OTHER)
    else:
        fstat = os.fstat

        def given_away(descriptor: int) -> os.stat_result:
            about = fstat(descriptor)
            return os.stat_result((*about[:4], OTHER, *about[5:])) if about.st_ino == theirs.stat().st_ino else about

        monkeypatch.setattr(os, "fstat", given_away)
    with pytest.raises(UserError, match=r"theirs belongs to another user \(uid \d+\).*; set A to a folder"):
        private_folder(theirs, "set A to a folder of your own")
    monkeypatch.undo()
    ours = tmp_path / "ours"
    ours.mkdir()
    for mode in (0o777, 0o770, 0o707, 0o1777):
        ours.chmod(mode)
        with pytest.raises(UserError, match="can be written by others"):
            private_folder(ours, "way out")
    ours.chmod(0o755)
    assert private_folder(ours, "way out").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(UserError, match="is a link or a file"):
            private_folder(tmp_path / name, "way out")


@pytest.mark.case("H07")
def test_compiled_code_lies_in_a_private_folder(tmp_path: Path, monkeypatch) -> None:
    import tempfile

    from tarflow.trainer.parallel.apply import use_private_compiler_cache

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    (tmp_path / f"tarflow-compiled-{os.geteuid()}").symlink_to(tmp_path)
    with pytest.raises(UserError, match="set TORCHINDUCTOR_CACHE_DIR"):
        use_private_compiler_cache()
    (tmp_path / f"tarflow-compiled-{os.geteuid()}").unlink()
    use_private_compiler_cache()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    use_private_compiler_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


# --- the sources -----------------------------------------------------------------------------------------------------

# Calls that write by themselves, and why they may: into a file or folder that was just made under a name of its own.
WITH_REASON = {
    "models/weights.py": "written by write_atomic",
    "models/formats/tensor_files.py": "written by write_atomic",
    "tarflow/npz.py": "a file that its caller has opened",
    "trainer/run_dir.py": "the run directory itself, which a user has named",
    "trainer/parallel/apply.py": "the name of the system's folder; what lies there is checked by private_folder",
    "trainer/checkpoint/commit.py": "a new folder, which must not be there before",
    "evaluation/results.py": "a new folder under a drawn name",
    "evaluation/samples/store.py": "a file that SharedWork has made",
    "evaluation/samples/store_formats.py": "a file that create_empty has made",
    "evaluation/worker/chunk_file.py": "a file that SharedWork has made",
    "evaluation/references/reference.py": "a file that SharedWork or write_atomic has made",
    "cluster/submission/snapshot.py": "a new folder under a drawn name",
    "models/sampling/native_build.py": "in a private folder",
    "tarflow/file_systems.py": "a tool itself, with tests of its own",
    "data_pipeline/storage/cache_folder.py": "a tool itself, with tests of its own",
    "data_pipeline/storage/access.py": "the name of the system's folder; what lies there is checked by private_folder",
    "data_pipeline/loading/worker_pool.py": "a temporary file without a name",
    "data_pipeline/prepare/verify.py": "a temporary folder of its own",
    "data_pipeline/prepare/write.py": "a new folder, which must not be there before",
    "data_pipeline/prepare/card.py": "the same folder",
    "data_pipeline/index/writer.py": "a new folder, which must not be there before",
}
TOOLS = {"files.py", "leases.py", "terminal.py"}  # these are what is tried above
WRITE = {
    "write_text",
    "write_bytes",
    "touch",
    "mkdir",
    "makedirs",
    "symlink_to",
    "save_file",
    "NamedTemporaryFile",
    "mkstemp",
}
WRITE_OF = {"np": {"save", "savez"}, "torch": {"save"}, "shutil": {"copy", "copyfile", "copytree", "move", "rmtree"},
            "os": {"open", "mkdir", "makedirs"}}  # fmt: skip


def writes(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function, text = node.func, ast.unparse(node)
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        if (
            owner == "os"
            and name == "open"
            and not {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"} & set(re.findall(r"\w+", text))
        ):
            continue
        if (owner and name in WRITE) or owner == "tempfile" or name in WRITE_OF.get(owner, ()) or name == "save_file":
            yield f"line {node.lineno}: {text[:100]}"
        elif name == "open" and owner in ("", "tarfile", "io") and "open_own(" not in text and "create(" not in text:
            given = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            modes = [item.value for item in given if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            if any(set(mode) & set("wax+") for mode in modes):
                yield f"line {node.lineno}: {text[:100]}"


@pytest.mark.parametrize("room", ["tarflow", "models", "data_pipeline", "trainer", "evaluation", "cluster"])
@pytest.mark.case("H07")
def test_whatever_writes_goes_by_the_tools_that_follow_no_link(room: str) -> None:
    files = (ROOT / room).glob("*.py") if room == "tarflow" else (ROOT / room).rglob("*.py")
    for path in files:
        name = str(path.relative_to(ROOT))
        if not (name in WITH_REASON or (room == "tarflow" and path.name in TOOLS)):
            assert list(writes(path)) == [], f"{name} writes by itself: use tarflow/files.py"


def test_the_reasons_are_those_of_files_that_write() -> None:
    assert [name for name in WITH_REASON if not list(writes(ROOT / name))] == []
