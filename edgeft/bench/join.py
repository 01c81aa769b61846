"""`python -m edgeft.bench.join GROUP COMMAND...`: enter a control group, then become the command.

A process that enters before it does anything else has all of its memory counted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    group, *command = sys.argv[1:]
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()), "ascii")
    os.execvp(command[0], command)
