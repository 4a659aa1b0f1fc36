"""Another user of this node: a real one where the tests run as root, else only the owner of a path is another."""

import json
import os
import subprocess
import sys
from pathlib import Path

OTHER = 12345
ROOT = os.geteuid() == 0


def let_pass(folder: Path) -> None:
    """Let other users pass through pytest's folders down to this one, and do no more there."""
    for above in (folder, *folder.parents):
        above.chmod(above.stat().st_mode | 0o011)
        if above.name.startswith("pytest-of-"):
            return


def attempts_of_another(imports: str, *attempts: str) -> list[str]:
    """What came of each expression, evaluated by the other user: its value or `ERROR: ...`. Needs root.

    What is imported is imported before: the interpreter may lie where only root may read.
    """
    program = "\n".join([
        "import json, os", "from pathlib import Path", imports,
        f"os.setgroups([]); os.setgid({OTHER}); os.setuid({OTHER}); os.umask(0)",
        "def attempt(what):",
        "    try: return repr(what())",
        "    except (OSError, ValueError) as error: return f'{type(error).__name__}: {error}'",
        f"print(json.dumps([{', '.join(f'attempt(lambda: {text})' for text in attempts)}]))",
    ])  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found
