"""Programs in fresh processes that share one import of torch, which takes seconds.

A server imports torch and nothing of issp; it forks for every program. So a program sees its own
environment variables, its own import of issp and torch's state before any operation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SERVER = """
import json, os, sys, traceback, warnings
import PRELOADED

def run(asked):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(asked["environment"])
    if asked["warnings"]:
        warnings.simplefilter(asked["warnings"], RuntimeWarning)
    try:
        exec(asked["code"], {"__name__": "__main__"})
        return 0
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    child = os.fork()
    if not child:
        status = run(json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkServer:
    """`run` is `subprocess.run([sys.executable, "-c", code])` without the import of torch.

    Args:
        preloaded: what else the programs need not import, in place of torch.
    """

    def __init__(self, preloaded: str = "torch") -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER.replace("PRELOADED", preloaded)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def run(
        self, code: str, warnings: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program; `warnings` is the action for RuntimeWarning, such as "error"."""
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
            asked = {"code": code, "warnings": warnings, "environment": environment, **files}
            print(json.dumps(asked), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            printed = {name: Path(path).read_text() for name, path in files.items()}
        return subprocess.CompletedProcess(code, status, **printed)

    def close(self) -> None:
        """Ends the server."""
        self._server.communicate()
