"""Print control characters to both guarded outputs, and style from a library that may."""

import sys

from tarflow.terminal import guarded_outputs, styled

with guarded_outputs():
    print("a\x1b[31m\x9b1m\tb\r50%\u202e")
    print("err\x07", file=sys.stderr)
    styled(sys.stdout).write("\x1b[1mbar\x1b[0m\n")
    print("after")
