"""The house stands as designed: imports go one way, the front door is quick, files stay short."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("models", "data_pipeline", "trainer", "evaluation", "cluster")

# What each part of a room may import, from the top of the drawing in docs/design.md downwards: a part sees its own files and
# the parts in later lines, never an earlier one. A part is a sub-room or a file; the parts of one line are neighbours, which
# do not see each other.
LAYERS = {
    "models": """
        sampling denoise
        likelihood weights init
        flow formats
        transformer cost presets
        config noise
        provenance
        randomness float32 errors
    """,
    "data_pipeline": """
        commands
        prepare
        loading
        storage
        index
        layout
        images
        keyed errors array_pickles
    """,
    "trainer": """
        commands
        train
        loop
        hooks start
        saving
        ema
        checkpoint
        plan
        resilience
        parallel
        tracking
        run_dir step_inputs schedule
        config
        batch metrics optimizer stats
        outbox
        errors
    """,
    "evaluation": """
        commands
        start
        sweep latents
        flow
        given
        likelihood
        worker
        references report
        results shared_sampling
        samples
        networks
        sweep_file
        result_file tracking
        metrics
        run_config images shared_work batches
        errors log stopwatch
    """,
    "cluster": """
        commands
        status cancel logs
        submission
        job
        slurm
        hosts exit_codes
        answers
        errors
    """,
}
ROOMS_BELOW = {
    "models": set(),
    "data_pipeline": set(),
    "trainer": {"models", "data_pipeline"},
    "evaluation": {"models", "data_pipeline", "trainer"},
    "cluster": {"models", "data_pipeline", "trainer", "evaluation"},
}
# Of the trainer, the evaluation sees the configuration, the format of a run directory and the trackers, never the loop.
TRAINER_FOR_EVALUATION = {"config", "run_dir", "checkpoint", "tracking", "errors"}
# Files of tarflow/ that every room may import.
GROUND = {
    "code_version", "devices", "errors", "file_systems", "files", "image_size", "interpreter", "leases", "npz", "records",
    "settings", "terminal",
}  # fmt: skip


def layers(room: str) -> dict[str, int]:
    """Part of a room -> its line in the drawing, from the top."""
    lines = LAYERS[room].strip().splitlines()
    return {part: number for number, line in enumerate(lines) for part in line.split()}


def sources() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {f"tarflow.{p.stem}": p for p in (ROOT / "tarflow").glob("*.py")}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            found[".".join(["tarflow", *path.relative_to(ROOT).with_suffix("").parts])] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


SOURCES = sources()


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, at any depth, and for types only as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def imported_modules(name: str) -> set[str]:
    """The package's own modules that a module imports; a name in a module counts as that module."""
    return {n for n in imports(SOURCES[name]) if n in SOURCES and n != name and n.count(".") > 0}


def is_package(name: str) -> bool:
    return SOURCES[name].name == "__init__.py"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_and_their_parts_go_downwards(room: str) -> None:
    order = layers(room)
    inside = {n: p for n, p in SOURCES.items() if n.startswith(f"tarflow.{room}.")}
    assert set(order) == {n.split(".")[2] for n in inside}, "the drawing names every part, and nothing else"
    for name in inside:
        here = name.split(".")[2]
        for other in imported_modules(name):
            _, there, *rest = other.split(".")
            if there == room:
                assert not rest or rest[0] == here or order[rest[0]] > order[here], f"{name} imports {other}"
            elif there in ROOMS:
                assert there in ROOMS_BELOW[room], f"{name} imports {other}"
                if room == "evaluation" and there == "trainer" and rest:
                    assert rest[0] in TRAINER_FOR_EVALUATION, f"{name} imports {other}"
            else:
                assert there in GROUND, f"{name} imports {other}"


def test_the_ground_knows_no_room() -> None:
    for name in (f"tarflow.{part}" for part in GROUND):
        assert not {n for n in imported_modules(name) if n.split(".")[1] in ROOMS}, name


def test_no_files_import_each_other_in_a_circle() -> None:
    waiting = {name: {n for n in imported_modules(name) if not is_package(n)} for name in SOURCES}
    while free := {name for name, needs in waiting.items() if not needs}:
        waiting = {name: needs - free for name, needs in waiting.items() if name not in free}
    assert not waiting, "each of these leads into a circle"


PROJECT_FILES = [p for top in (*ROOMS, "tarflow", "benchmarks", "tests") for p in (ROOT / top).rglob("*.py")]


def test_nothing_imports_a_room_by_its_bare_name() -> None:
    for path in set(PROJECT_FILES) - {Path(__file__)}:
        names = {n.split(".")[0] for n in imports(path)}
        assert not names & set(ROOMS), f"{path.relative_to(ROOT)} imports {names & set(ROOMS)}"
        text = path.read_text()
        for room in re.findall(r"(?:^|[\"';\n])\s*(?:from|import) +(\w+)", text):  # programs in strings too
            assert room not in ROOMS, f"{path.relative_to(ROOT)}: a program in a string imports {room}"
        for module in re.findall(
            r"[\"'](\w+)(?:\.\w+)+[\"':]", text
        ):  # names for monkeypatch and -m; `evaluation` is a section, too
            assert module not in ROOMS or module == "evaluation", f"{path.relative_to(ROOT)} names a module of {module}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_refuses_its_bare_name(room: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert f"tarflow.{room}" in done.stderr
    assert done.returncode == 1


def test_no_module_is_loaded_under_two_names() -> None:
    """After everything was imported, no file stands behind two modules."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)]\n"
        "import os; real = [os.path.realpath(f) for f in files]\n"
        f"ours = [f for f in real if f.startswith({str(ROOT)!r} + os.sep) and '.venv' not in f]\n"
        "assert len(ours) > 100 and len(ours) == len(set(ours)), sorted(f for f in ours if ours.count(f) > 1)\n"
    )
    names = sorted(n for n in SOURCES if not n.endswith("__main__"))
    done = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-1000:]


def test_rooms_stay_small_and_say_what_lives_there() -> None:
    for top in (*ROOMS, "tarflow"):
        for folder in (ROOT / top, *(p for p in (ROOT / top).rglob("*") if p.is_dir() and p.name != "__pycache__")):
            files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
            if folder.is_symlink() or not (files or (folder / "__init__.py").exists()):
                continue
            assert len(files) <= 14, f"{folder.relative_to(ROOT)} holds {len(files)} files"
            doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert doc, f"{folder.relative_to(ROOT)}/__init__.py says nothing"
            assert len(doc.splitlines()) <= 12
            for path in files:
                lines = len(path.read_text().splitlines())
                assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
                if folder.name == "commands":
                    assert lines <= 150, f"{path.relative_to(ROOT)} has {lines} lines"


def test_tests_mirror_the_tree() -> None:
    """A folder of tests is named after the sub-room that it tests."""
    for room in ROOMS:
        for folder in (p for p in (ROOT / "tests" / room).rglob("*") if p.is_dir() and list(p.glob("test_*.py"))):
            assert (ROOT / folder.relative_to(ROOT / "tests")).is_dir(), folder


def run_tarflow(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The front door in a fresh interpreter, away from the project's folder."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tarflow", *arguments], capture_output=True, text=True, cwd="/",
        env={**os.environ, "COLUMNS": "100"}, timeout=60,
    )  # fmt: skip


HEAVY = ("torch", "pydantic", "deepspeed", "streaming", "pyarrow", "numpy", "webdataset")


VERBS = (
    "data",
    "init",
    "train",
    "ema",
    "checkpoint",
    "evaluate",
    "sample",
    "likelihood",
    "encode",
    "decode",
    "sweep-guidance",
    "reference",
    "score",
    "report",
    "submit",
    "submit-eval",
    "status",
    "cancel",
    "logs",
)


def test_every_verb_is_checked_here() -> None:
    import tarflow.cli

    assert set(VERBS) == set(tarflow.cli.VERBS)


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_heavy_and_shows_an_example(arguments: list[str]) -> None:
    done = run_tarflow(*arguments)
    assert done.returncode == 0, done.stderr[-500:]
    assert "example" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & set(HEAVY)


def test_help_answers_before_a_person_would_notice() -> None:
    """The best of five, so that a busy machine does not decide; the bar is half a second of CPU time."""
    used = []
    for _ in range(5):
        before = os.times()
        assert subprocess.run([sys.executable, "-m", "tarflow", "--help"], capture_output=True, cwd="/").returncode == 0
        after = os.times()
        used.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(used) < 0.5


def test_unknown_verb_and_user_errors_are_one_message_without_a_traceback(tmp_path: Path) -> None:
    done = run_tarflow("trian")
    assert done.returncode == 2
    assert "invalid choice: 'trian'" in done.stderr
    done = run_tarflow("train", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "no configuration file at" in done.stderr
    assert "Traceback" not in done.stderr


def test_pages_that_the_readme_points_to_exist_and_every_setting_is_described() -> None:
    from tarflow.trainer.config.page import page
    from tarflow.trainer.config.schema import Config

    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == page(), "run `python -m tarflow.trainer.config.page > docs/configuration.md`"
    for section, field in Config.model_fields.items():
        assert field.annotation is not None
        for name, value in field.annotation.model_fields.items():
            assert f"`{section}.{name}`" in text
            assert value.description, f"{section}.{name} has no description"


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, those inside classes and functions as well."""
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_function_is_longer_than_a_screen() -> None:
    programs = [*SOURCES.values(), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}": f.end_lineno - f.lineno + 1
        for path in programs
        for f in functions(path)
        if f.end_lineno is not None
    }
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


def test_reported_faults_are_marks_not_names_of_tests() -> None:
    seen = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for function in functions(path):
            assert not re.match(r"test_[A-Za-z]\d{2}[a-z]?_", function.name), (
                f"{path.relative_to(ROOT)}: {function.name}"
            )
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.case":
                    seen |= {ast.literal_eval(given) for given in mark.args}
    assert len(seen) > 90
    assert all(re.fullmatch(r"[A-Z]\d{2}[a-z]?", name) for name in seen)
