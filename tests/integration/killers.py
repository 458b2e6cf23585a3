"""Plant a job that kills its worker, into worker processes of tests only.

`python -m tests.integration.killers` is `vdiff worker` whose engine is killed by SIGKILL when it
takes a request whose prompt holds `KILLER_TOKEN`, as a fault of a kernel or of a driver does it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

KILLER_TOKEN = 11
READY_STEPS = 2  # the killer strikes when it has denoised, so that others of its batch run as well


def plant() -> None:
    """Let the engine die in a step of a request with the token."""
    from worker.engine.step import Stepper

    decode = Stepper.decode
    steps: dict[str, int] = {}

    def deadly(self: Any, chosen: Any) -> Any:
        for answer, _ in chosen:
            if KILLER_TOKEN in answer.request.prompt_token_ids:
                request_id = answer.request.request_id
                steps[request_id] = steps.get(request_id, 0) + 1
                if steps[request_id] > READY_STEPS:
                    os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, chosen)

    Stepper.decode = deadly  # type: ignore[method-assign]


if __name__ == "__main__":
    plant()
    from shared.settings import load_settings
    from worker.main import run

    sys.exit(run(load_settings()))
