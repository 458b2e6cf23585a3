"""The benchmarks of vdiff. Each starts its own servers on free ports and stops them, also on
Ctrl-C.

    python benchmarks/run_benchmark.py queue        what a job costs over the same request in
                                                    process
    python benchmarks/run_benchmark.py throughput   32 HTTP clients against `vdiff generate`
    python benchmarks/run_benchmark.py accept       jobs accepted a second, one by one and as a
                                                    batch
    python benchmarks/run_benchmark.py overhead     from claim to end, less the engine's work
    python benchmarks/run_benchmark.py webhooks     webhooks delivered a second
    python benchmarks/run_benchmark.py interactive  a chat's time while 50,000 bulk jobs wait
    python benchmarks/run_benchmark.py engine       the engine against a plain loop
    python benchmarks/run_benchmark.py batch        a batch of 50,000 lines: time to accept it,
                                                    memory of the API
    python benchmarks/run_benchmark.py bulk         jobs a second through a batch against `vdiff
                                                    generate`
    python benchmarks/run_benchmark.py startup      `make up` of a fresh clone to the first answer
    python benchmarks/run_benchmark.py all          these one after another

Tables go to stdout, progress to stderr, JSON into --output. The numbers in docs/benchmarks say
which command made them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # a checkout wins over an installed vdiff

from report import machine, medians, publish, say

EXIT_INTERRUPTED = 130
Rows = list[dict[str, Any]]


def queue(args: argparse.Namespace) -> Rows:
    import queue_overhead

    return [queue_overhead.run(samples=args.samples)]


def throughput(args: argparse.Namespace) -> Rows:
    import throughput as benchmark

    return benchmark.run(
        clients=args.clients, requests=args.requests, slots=args.slots, slow_ms=args.step_ms
    )


def engine(args: argparse.Namespace) -> Rows:
    import engine_reference

    return engine_reference.run(
        width=args.width,
        layers=args.layers,
        vocab=args.vocab,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        batches=args.batches,
    )


def accept(args: argparse.Namespace) -> Rows:
    import job_system

    return job_system.accept(jobs=args.jobs, clients=args.submitters)


def overhead(args: argparse.Namespace) -> Rows:
    import job_system

    return job_system.overhead(samples=args.overhead_samples)


def webhooks(args: argparse.Namespace) -> Rows:
    import job_system

    return job_system.webhooks(deliveries=args.deliveries)


def interactive(args: argparse.Namespace) -> Rows:
    import job_system

    return job_system.interactive(samples=args.chats, waiting=args.waiting)


def batch(args: argparse.Namespace) -> Rows:
    import batch_accept

    return [
        batch_accept.run(lines=lines, words=args.words, worker=worker, line_bytes=args.line_bytes)
        for lines in args.lines
        for worker in args.worker
    ]


def bulk(args: argparse.Namespace) -> Rows:
    import batch_ratio

    return batch_ratio.run(
        lines=args.bulk_lines,
        slow_lines=args.slow_lines,
        slots=args.bulk_slots,
        slow_ms=args.slow_step_ms,
    )


def startup(args: argparse.Namespace) -> Rows:
    import startup as benchmark

    return benchmark.run(source=args.source, limit_seconds=args.limit_seconds)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "queue": queue,
    "throughput": throughput,
    "accept": accept,
    "overhead": overhead,
    "webhooks": webhooks,
    "interactive": interactive,
    "engine": engine,
    "batch": batch,
    "bulk": bulk,
    "startup": startup,
}


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="which", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--repeats", type=int, default=1, help="times; the medians are shown [1]")
    common.add_argument(
        "--output",
        type=Path,
        default=Path("bench-results"),
        help="folder of the JSON [bench-results]",
    )
    options = {name: argparse.ArgumentParser(add_help=False) for name in BENCHMARKS}
    options["queue"].add_argument(
        "--samples", type=int, default=200, help="jobs, one at a time [200]"
    )
    options["throughput"].add_argument("--clients", type=int, default=32, help="at once [32]")
    options["throughput"].add_argument("--requests", type=int, default=256, help="in all [256]")
    options["throughput"].add_argument("--slots", type=int, default=8, help="of the engine [8]")
    options["throughput"].add_argument(
        "--step-ms", type=float, default=50.0, help="of the slow model, at least [50]"
    )
    options["accept"].add_argument("--jobs", type=int, default=5000, help="of each kind [5000]")
    options["accept"].add_argument(
        "--submitters", type=int, default=32, help="clients at once [32]"
    )
    options["overhead"].add_argument(
        "--overhead-samples", type=int, default=200, help="jobs, one at a time [200]"
    )
    options["webhooks"].add_argument("--deliveries", type=int, default=5000, help="in all [5000]")
    options["interactive"].add_argument(
        "--chats", type=int, default=200, help="one at a time, with and without [200]"
    )
    options["interactive"].add_argument(
        "--waiting", type=int, default=50_000, help="bulk jobs that wait [50000]"
    )
    options["engine"].add_argument(
        "--width", type=int, default=256, help="of the random model [256]"
    )
    options["engine"].add_argument("--layers", type=int, default=4, help="of the random model [4]")
    options["engine"].add_argument(
        "--vocab", type=int, default=32_000, help="of the random model [32000]"
    )
    options["engine"].add_argument("--prompt-tokens", type=int, default=64, help="[64]")
    options["engine"].add_argument(
        "--max-tokens", type=int, default=128, help="tokens and steps of an answer [128]"
    )
    options["engine"].add_argument(
        "--batches", type=int, nargs="+", default=[1, 8], help="requests at once [1 8]"
    )
    options["batch"].add_argument(
        "--lines", type=int, nargs="+", default=[50_000], help="of the file [50000]"
    )
    options["batch"].add_argument(
        "--worker",
        nargs="+",
        choices=["running", "stopped"],
        default=["running"],
        help="meanwhile [running]",
    )
    options["batch"].add_argument("--words", type=int, default=20, help="of each prompt [20]")
    options["batch"].add_argument(
        "--line-bytes",
        type=int,
        default=0,
        help="of each line, filled up with labels, 8000 at most [as the prompt has]",
    )
    options["bulk"].add_argument(
        "--bulk-lines", type=int, default=4_000, help="of the file for vdiff-tiny [4000]"
    )
    options["bulk"].add_argument(
        "--slow-lines", type=int, default=400, help="of that for the slow model [400]"
    )
    options["bulk"].add_argument("--bulk-slots", type=int, default=16, help="of the engine [16]")
    options["bulk"].add_argument(
        "--slow-step-ms", type=float, default=50.0, help="of the slow model, at least [50]"
    )
    options["startup"].add_argument("--source", default=".", help="repository to clone [.]")
    options["startup"].add_argument(
        "--limit-seconds", type=float, default=900.0, help="give up after [900]"
    )
    for name in BENCHMARKS:
        commands.add_parser(name, parents=[common, options[name]], help=name)
    commands.add_parser("all", parents=[common, *options.values()], help="all of them")
    return root


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # like Ctrl-C: the servers are stopped on the way out
    try:
        for name in BENCHMARKS if args.which == "all" else (args.which,):
            facts = machine()
            say(f"{name}: load average {facts['load_average_before'][0]:.2f} before")
            runs = []
            for turn in range(args.repeats):
                say(f"{name}: run {turn + 1} of {args.repeats}")
                runs.append(BENCHMARKS[name](args))
            rows = [medians(same) for same in zip(*runs, strict=True)]
            publish(name, rows, runs, facts, args.output)
    except KeyboardInterrupt:
        say("interrupted; what was started is stopped")
        return EXIT_INTERRUPTED
    except RuntimeError as exc:
        say(f"benchmark failed: {exc}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
