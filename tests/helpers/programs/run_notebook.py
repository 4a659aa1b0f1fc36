"""`run_notebook.py FILE.ipynb`: run its cells of code in their order, in one namespace, as a notebook does."""

import json
import sys
from pathlib import Path

sys.path[0] = ""  # a notebook finds modules in the current folder
names: dict[str, object] = {"__name__": "__main__"}
for cell in json.loads(Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)  # noqa: S102 -- that is what it is for
