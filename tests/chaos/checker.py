"""Rules, judged from the history and the database's rows alone. Pure; imports nothing of the
product.

Each rule is a function that yields what breaks it. The states and moves are written down here once
more, on purpose: a mistake in the product's own table must not excuse itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos import outage_rules, webhook_rules
from tests.chaos.outage_rules import quiet_seconds
from tests.chaos.records import TERMINAL, Database, History, JobRow, Move, Seen, digest, text_of

CANCEL_SECONDS = 12.0  # in which a cancel that was answered takes effect, faults apart
FAULT_MARGIN_SECONDS = 12.0  # after a fault, before patience begins to count again
MOVES = {
    "queued": {"running", "cancelled", "expired"},
    "running": {"queued", *TERMINAL},
    "succeeded": set(),
    "failed": {"queued"},
    "cancelled": {"queued"},
    "expired": {"queued"},
}


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    subject: str  # a job's id, mostly
    what: str


def check(history: History, database: Database) -> list[Violation]:
    """Every violation of every rule."""
    return [
        Violation(name, subject, what)
        for name, rule in RULES.items()
        for subject, what in rule(history, database)
    ]


Found = Iterator[tuple[str, str]]


def _moves_of(database: Database) -> dict[str, list[Move]]:
    moves: dict[str, list[Move]] = defaultdict(list)
    for move in sorted(database.moves, key=lambda m: m.n):
        moves[move.job_id].append(move)
    return moves


def accepted_jobs_end(history: History, database: Database) -> Found:
    """Whoever was told an id has a job, and it is over; so is every other job."""
    for accepted in history.accepted:
        row = database.jobs.get(accepted.job_id)
        if row is None:
            yield accepted.job_id, f"accepted ({accepted.how}), and there is no such job"
        elif row.tenant != accepted.tenant:
            yield accepted.job_id, f"accepted for {accepted.tenant}, and belongs to {row.tenant}"
    for row in database.jobs.values():
        if row.status not in TERMINAL:
            yield row.id, f"is {row.status} at the end"


def ends_once_per_life(history: History, database: Database) -> Found:
    """Only allowed moves; one end a life; another life only by a retry; each attempt claimed once
    and ended by its holder.
    """
    asked = Counter(retry.job_id for retry in history.retries)
    for job_id, moves in _moves_of(database).items():
        yield from _walk(job_id, moves)
        lives = moves[-1].life
        if (
            lives - 1 > asked[job_id]
            and (row := database.jobs.get(job_id)) is not None
            and row.batch_id is None
        ):
            yield job_id, f"has {lives} lives after {asked[job_id]} retries"
    ends: Counter[tuple[str, int]] = Counter()
    for attempt in database.attempts:
        if attempt.outcome == "running":
            yield attempt.job_id, f"attempt {attempt.attempt} still runs at the end"
        ends[attempt.job_id, attempt.life] += attempt.outcome in TERMINAL - {"failed"}
    for (job_id, life), count in ends.items():
        if count > 1:
            yield job_id, f"{count} attempts of life {life} ended it"


def _walk(job_id: str, moves: list[Move]) -> Found:
    if moves[0].before is not None or moves[0].after != "queued":
        yield job_id, f"began as {moves[0].before} -> {moves[0].after}"
    ends: Counter[int] = Counter()
    for before, move in zip([None, *moves], moves, strict=False):
        if before is None:
            continue
        if move.before != before.after:
            yield job_id, f"was {before.after}, and moved from {move.before}"
        if move.before == move.after:
            yield job_id, f"its {move.after} row was changed again"
        elif move.after not in MOVES.get(move.before or "", set()):
            yield job_id, f"moved {move.before} -> {move.after}"
        reborn = move.before in TERMINAL and move.after == "queued"
        if move.life != before.life + reborn:
            yield (
                job_id,
                f"moved {move.before} -> {move.after} from life {before.life} to {move.life}",
            )
        if move.attempt != before.attempt + (move.after == "running"):
            yield (
                job_id,
                f"moved {move.before} -> {move.after} from attempt {before.attempt} to {move.attempt}",
            )
        ends[move.life] += move.after in TERMINAL
    for life, count in ends.items():
        if count > 1:
            yield job_id, f"ended {count} times in life {life}"


def ends_stay(history: History, database: Database) -> Found:
    """Check that an end stays as it was read, within its run; runs only go up; success is final."""
    seen: dict[str, list[Seen]] = defaultdict(list)
    for one in history.seen:
        seen[one.job_id].append(one)
    for job_id, looks in seen.items():
        ends: dict[int, Seen] = {}
        for look in sorted(looks, key=lambda s: s.at):
            if look.status in TERMINAL:
                first = ends.setdefault(look.life, look)
                if (first.status, first.end) != (look.status, look.end):
                    yield (
                        job_id,
                        f"read as {first.status} {first.end}, then as {look.status} {look.end}, life {look.life}",
                    )
        known = sorted((s for s in looks), key=lambda s: s.at)
        for look in looks:
            earlier = [s for s in known if s.at < look.asked_at]
            if any(s.life > look.life for s in earlier):
                yield job_id, f"life {look.life} was shown after a later one"
            if look.status not in TERMINAL and any(
                s.life == look.life and s.status in TERMINAL for s in earlier
            ):
                yield job_id, f"was over, then {look.status}, life {look.life}"
        row = database.jobs.get(job_id)
        for life, end in ends.items():
            if row is None:
                break
            if end.status == "succeeded" and (row.life, row.status) != (life, "succeeded"):
                yield (
                    job_id,
                    f"was read as succeeded in life {life}, and is {row.status} in life {row.life}",
                )
            elif row.life == life and (row.status, text_of(row.result)) != (end.status, end.text):
                yield job_id, f"was read as {end.status}, and is {row.status} with another text"


def cancelled_stay_cancelled(history: History, database: Database) -> Found:
    """No job that was seen cancelled succeeded later, unless by a retry."""
    moves = _moves_of(database)
    for job_id, life in {(s.job_id, s.life) for s in history.seen if s.status == "cancelled"}:
        if any(
            m.life == life and m.after in TERMINAL - {"cancelled"} for m in moves.get(job_id, ())
        ):
            yield job_id, f"was cancelled, and ended otherwise, life {life}"


def cancels_are_heeded(history: History, database: Database) -> Found:
    """After a cancel was answered nobody begins the job, and what runs of it stops soon."""
    moves = _moves_of(database)
    for cancel in history.cancels:
        life = [m for m in moves.get(cancel.job_id, ()) if m.life == cancel.life]
        after = [m for m in life if m.at > cancel.at]
        for move in after:
            if move.after == "running":
                yield (
                    cancel.job_id,
                    f"began {move.at - cancel.at:.1f} s after its cancel was answered",
                )
        end = next((m for m in after if m.after in TERMINAL), None)
        if end is not None and end.after != "cancelled":
            patience = quiet_seconds(history, cancel.at, end.at, margin=FAULT_MARGIN_SECONDS)
            if patience > CANCEL_SECONDS:
                yield (
                    cancel.job_id,
                    f"went on for {end.at - cancel.at:.1f} s after its cancel was answered, and {end.after}",
                )


def failures_have_reasons(history: History, database: Database) -> Found:
    """Nothing we send is wrong: a job fails only when workers died under it as often as
    max_attempts says.

    Whether those deaths count against it is the rule `neighbours succeed`.
    """
    lost = Counter((a.job_id, a.life) for a in database.attempts if a.outcome in ("lost", "failed"))
    for row in database.jobs.values():
        if row.status == "failed":
            code = (row.error or {}).get("code")
            if code not in outage_rules.LOST_CODES or lost[row.id, row.life] < row.max_attempts:
                yield row.id, f"failed with {code} after {lost[row.id, row.life]} lost attempts"


def tenants_are_apart(history: History, database: Database) -> Found:
    """Another's job is 404, whatever is asked of it; lists have one's own."""
    for foreign in history.foreign:
        if foreign.code < 500 and foreign.code not in (404, 429):
            yield foreign.what, f"answered {foreign.code} to {foreign.tenant}"
    for listed in history.listed:
        for job_id in listed.job_ids:
            row = database.jobs.get(job_id)
            if row is None or row.tenant != listed.tenant:
                yield job_id, f"was listed for {listed.tenant}"


def one_key_one_job(history: History, database: Database) -> Found:
    """An Idempotency-Key gives one job, however often it is sent and to whom."""
    jobs: dict[tuple[str, str], set[str]] = defaultdict(set)
    for accepted in history.accepted:
        if accepted.idempotency_key is not None:
            jobs[accepted.tenant, accepted.idempotency_key].add(accepted.job_id)
    for row in database.jobs.values():
        if row.idempotency_key is not None:
            jobs[row.tenant, row.idempotency_key].add(row.id)
    for (_, key), ids in jobs.items():
        if len(ids) > 1:
            yield key, f"gave {len(ids)} jobs: {', '.join(sorted(ids))}"


def same_request_same_text(history: History, database: Database) -> Found:
    """Prompt, parameters and seed decide the text, whatever died in between."""
    texts: dict[str, dict[str, str]] = defaultdict(
        dict
    )  # by request: a text, and one job that has it
    signs = {
        (b.batch_id, custom_id): sign
        for b in history.batches
        for custom_id, sign in b.requests.items()
    }
    requests = {accepted.job_id: accepted.request for accepted in history.accepted}
    for row in database.jobs.values():
        sign = requests.get(row.id) or signs.get((row.batch_id or "", row.custom_id or ""))
        text = text_of(row.result)
        if sign is not None and text is not None:
            texts[sign].setdefault(text, row.id)
    for sign, found in texts.items():
        if len(found) > 1:
            yield sign, f"gave {len(found)} texts: jobs {', '.join(sorted(found.values()))}"


def streams_tell_the_text(history: History, database: Database) -> Found:
    """A whole stream is the job's text, a broken one its beginning."""
    for stream in history.streams:
        row = database.jobs.get(stream.job_id)
        text = None if row is None else text_of(row.result)
        if text is None:
            if stream.complete:
                yield (
                    stream.job_id,
                    f"streamed to its end, and is {row.status if row else 'nowhere'}",
                )
        elif stream.text != text[: len(stream.text)] or (stream.complete and stream.text != text):
            yield stream.job_id, f"streamed {stream.text!r}, and its text is {text!r}"


def usage_adds_up(history: History, database: Database) -> Found:
    """Tokens are those of the prompt and of the answer, once, and a batch's are its lines'."""
    known = {accepted.job_id: accepted for accepted in history.accepted}
    for row in database.jobs.values():
        if row.status == "succeeded":
            yield from _usage_of(
                row,
                known[row.id].max_tokens if row.id in known else None,
                row.id in known and known[row.id].whole,
            )
    for batch in history.batches:
        lines = [
            row.usage
            for row in database.jobs.values()
            if row.batch_id == batch.batch_id and row.usage
        ]
        shown = batch.shown.get("usage") or {}
        for name, ours in (
            ("input_tokens", "prompt_tokens"),
            ("output_tokens", "completion_tokens"),
        ):
            total = sum(usage[ours] for usage in lines)
            if shown.get(name, 0) != total:
                yield batch.batch_id, f"says {shown.get(name, 0)} {name}, its lines have {total}"


def _usage_of(row: JobRow, max_tokens: int | None, whole: bool) -> Found:
    usage = row.usage or {}
    prompt, completion = usage.get("prompt_tokens", -1), usage.get("completion_tokens", -1)
    if (row.result or {}).get("usage") != row.usage:
        yield row.id, "its result has another usage than the job"
    if usage.get("total_tokens") != prompt + completion:
        yield row.id, f"total_tokens {usage.get('total_tokens')} is not {prompt} + {completion}"
    if prompt != row.prompt_tokens:
        yield row.id, f"prompt_tokens {prompt}, and the prompt has {row.prompt_tokens}"
    if max_tokens is not None and not (
        completion == max_tokens if whole else 0 <= completion <= max_tokens
    ):
        yield row.id, f"completion_tokens {completion} of {max_tokens}{' whole' if whole else ''}"


def batches_have_every_line(history: History, database: Database) -> Found:
    """Each line is one job and one line of the files; the counts say so."""
    rows: dict[str, list[JobRow]] = defaultdict(list)
    for row in database.jobs.values():
        if row.batch_id is not None:
            rows[row.batch_id].append(row)
    for batch in history.batches:
        batch_id, shown, wanted = batch.batch_id, batch.shown, Counter(batch.requests.keys())
        if shown["status"] == "cancelled" and shown["in_progress_at"] is None:
            wanted = Counter()  # cancelled while its lines were being checked: none was accepted
        jobs = Counter(row.custom_id or "" for row in rows[batch_id])
        written = Counter(str(line["custom_id"]) for line in (*batch.output, *batch.errors))
        if jobs - wanted or (shown["status"] == "completed" and jobs != wanted):
            yield batch_id, f"has {jobs.total()} jobs for {wanted.total()} lines"
        if written != wanted:
            yield batch_id, f"its files have {written.total()} lines for {wanted.total()}"
        good = sum(row.status == "succeeded" for row in rows[batch_id])
        counts = (shown["request_counts"]["completed"], shown["request_counts"]["failed"])
        if counts != (good, wanted.total() - good) or len(batch.output) != good:
            yield (
                batch_id,
                f"counts {counts}, {len(batch.output)} lines of output, {good} jobs succeeded",
            )
        results = {row.custom_id: digest(row.result) for row in rows[batch_id] if row.result}
        for line in batch.output:
            if digest(line["response"]["body"]) != results.get(line["custom_id"]):
                yield batch_id, f"{line['custom_id']} has another result than its job"


RULES: dict[str, Callable[[History, Database], Found]] = {
    "accepted jobs end": accepted_jobs_end,
    "ends once per life": ends_once_per_life,
    "ends stay": ends_stay,
    "cancelled stays cancelled": cancelled_stay_cancelled,
    "cancels are heeded": cancels_are_heeded,
    "failures have reasons": failures_have_reasons,
    "tenants are apart": tenants_are_apart,
    "one key, one job": one_key_one_job,
    "same request, same text": same_request_same_text,
    "streams tell the text": streams_tell_the_text,
    "usage adds up": usage_adds_up,
    "batches have every line": batches_have_every_line,
    **outage_rules.RULES,
    **webhook_rules.RULES,
}
