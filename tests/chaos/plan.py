"""Which faults, on whom, for how long, and at which job: drawn from the seed. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

# kind: (how long it lasts at least and at most, seconds; how often it is in a deck)
KINDS: dict[str, tuple[float, float, int]] = {
    "kill -9 worker": (0.2, 3.0, 3),  # until it is begun anew
    "SIGSTOP worker": (1.0, 9.0, 2),  # shorter and longer than a lease
    "SIGTERM worker": (0.2, 1.0, 1),
    "clock of a worker wrong": (3.0, 10.0, 1),
    "kill -9 API": (0.2, 2.0, 2),
    "SIGSTOP API": (1.0, 6.0, 1),
    "kill -9 deliver": (0.2, 2.0, 1),
    "kill -9 PostgreSQL": (0.2, 3.0, 1),
    "kill -9 a backend of PostgreSQL": (0.0, 0.0, 1),
    "SIGSTOP PostgreSQL": (1.0, 5.0, 1),
    "kill -9 Redis": (0.2, 3.0, 1),
    "SIGSTOP Redis": (1.0, 7.0, 1),
    "FLUSHALL": (0.0, 0.0, 2),
    "Redis is full": (1.0, 6.0, 2),
    "Redis is a replica": (1.0, 6.0, 2),
    "Redis refuses writes": (1.0, 6.0, 1),
    "PostgreSQL is read-only": (1.0, 8.0, 2),
    "a job kills its worker": (0.0, 0.0, 2),
    "a background thread raises": (1.0, 6.0, 2),
    "no worker": (4.0, 9.0, 1),
    "connections paused": (1.0, 8.0, 2),
    "connections cut": (0.0, 0.0, 2),
    "messages twice": (0.0, 0.0, 1),
    "messages of jobs that are over": (0.0, 0.0, 1),
    "messages of nothing": (0.0, 0.0, 1),
    "receiver fails": (1.0, 6.0, 1),
    "receiver hangs": (1.0, 6.0, 1),
    "receiver redirects": (1.0, 5.0, 1),
    "receiver is slow": (2.0, 8.0, 1),
    "receiver refuses": (1.0, 6.0, 1),
    "receiver talks nonsense": (1.0, 5.0, 1),
    "receiver hangs up": (1.0, 5.0, 1),
    "receiver never ends its answer": (1.0, 5.0, 1),
}
OVERLAP = 0.2  # of the faults begin before the one before has ended


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    which: int  # of several targets; taken modulo their number
    seconds: float
    at_job: int  # begins when so many jobs were begun
    overlaps: bool


def make_plan(
    seed: int, *, jobs: int, faults: int, kinds: tuple[str, ...] = tuple(KINDS)
) -> list[Fault]:
    """Decks of all kinds, each shuffled, dealt evenly over the run; so many faults as there are
    cards show every kind.
    """
    rng = random.Random(f"plan {seed}")
    dealt: list[str] = []
    while len(dealt) < faults:
        deck = [kind for kind in kinds for _ in range(KINDS[kind][2])]
        rng.shuffle(deck)
        dealt += deck
    made = []
    for i, kind in enumerate(dealt[:faults]):
        shortest, longest, _ = KINDS[kind]
        which, seconds = rng.randrange(1000), round(rng.uniform(shortest, longest), 2)
        at_job = round(jobs * (i + 0.5) / (faults + 0.5))
        made.append(Fault(kind, which, seconds, at_job, rng.random() < OVERLAP))
    return made
