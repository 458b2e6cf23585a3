"""`vdiff ...` as a child of the chaos suite: the real program, with what only a test may change put
in before it starts.

CHAOS_SKEW_SECONDS      how wrong this process's clock is CHAOS_BUG               one of
`tests.chaos.bugs` CHAOS_DELIVERY_MARGIN   a shorter lease of webhooks than the product's, as all
clocks here are shorter CHAOS_TRIGGER           the file that names the threads that raise
(`tests.chaos.hooks`) CHAOS_KILLER            set: a request with the killer's seed ends this
process (`tests.chaos.hooks`)
"""

from __future__ import annotations

import os
import time
from pathlib import Path


def skew_clock(seconds: float) -> None:
    """Before anything else is imported, so that whoever asks for the time gets the wrong one;
    waiting is not affected.
    """
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


def main() -> None:
    if skew := os.environ.pop("CHAOS_SKEW_SECONDS", None):
        skew_clock(float(skew))
    bug = os.environ.pop("CHAOS_BUG", None)
    margin = os.environ.pop("CHAOS_DELIVERY_MARGIN", None)
    if margin is not None:
        import worker.delivery

        worker.delivery.LEASE_MARGIN_SECONDS = float(margin)
    if trigger := os.environ.pop("CHAOS_TRIGGER", None):
        from tests.chaos.hooks import raise_in_threads

        raise_in_threads(Path(trigger))
    if os.environ.pop("CHAOS_KILLER", None):
        from tests.chaos.hooks import kill_on_seed

        kill_on_seed()
    if bug is not None:
        from tests.chaos.bugs import BUGS

        BUGS[bug].plant()
    from vdiff.cli import main as vdiff

    vdiff()


if __name__ == "__main__":
    main()
