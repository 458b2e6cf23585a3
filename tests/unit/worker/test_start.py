"""The cost of a worker's start, counted in modules."""

from __future__ import annotations

import subprocess
import sys


def test_a_worker_that_compiles_nothing_imports_no_compiler() -> None:
    """`torch._dynamo` alone takes two seconds of each start."""
    program = "import sys, worker.main; print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
