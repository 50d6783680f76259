"""The comparison: what is live by base and log, against what is held; and the second look at each difference.

`differences` merges the two, both in order of key, and yields the keys in which they differ. While it runs, workers
apply and applications commit, so a difference is only a suspicion. `Confirm` looks again at what a chunk of keys hold
now, and a finding is what has all of this:

1. Base and log say what the key should hold at the scrub's tick, which its lane had passed before the first look.
2. What is held, read after that, differs.
3. After *that*, the log shows nothing of the key that is newer than the tick, and nothing of it is parked, neither
   then nor before. Effects are only of committed intents (I1): so nothing else can have been held in between.

Keys that fail 3 are in motion. They are not looked at until the next scrub, and counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg

from outbox import live, sql
from outbox.intent import Intent
from outbox.tick import Tick
from workers.scrub.finding import Finding
from workers.scrub.pace import Pace
from workers.scrub.subject import Fault, Held, Subject

_Group = tuple[Intent | None, list[Held]]


class Confirmed(NamedTuple):
    """What a second look found."""

    #: What is really wrong, in order of key.
    findings: list[Finding]
    #: How many keys are in motion.
    moving: int
    #: Key → the intent that says what it should hold, for those keys that weren't in motion before the look.
    expected: dict[str, Intent]


def paired(expected: Iterable[Intent], held: Iterable[Held]) -> Iterator[tuple[str, _Group]]:
    """Merge both by key, each in order of it. → key, its intent or None, what is held under it."""
    intents, things = iter(expected), iter(held)
    intent, thing = next(intents, None), next(things, None)
    while intent is not None or thing is not None:
        key = min(each.key for each in (intent, thing) if each is not None)
        wanted, found = None, list[Held]()
        if intent is not None and intent.key == key:
            wanted, intent = intent, next(intents, None)
        while thing is not None and thing.key == key:
            found.append(thing)
            thing = next(things, None)
        yield key, (wanted, found)


def judge(subject: Subject, key: str, group: _Group, pace: Pace) -> Finding | None:
    """What is wrong with one key, as it was read. None if nothing is."""
    intent, found = group
    if intent is None:
        if not found:
            return None
        why = "it is held, and by the log it was deleted or never put"
        return Finding("orphaned", key, found[0].id, why, subject.repair("orphaned"))
    if not found:
        return Finding("missing", key, intent.id, f"intent {intent.id} put it, and it is not held", "put")
    repair = subject.repair("corrupt")
    if len(found) > 1:
        # No intent removes one that its key doesn't lead to.
        repair = "" if any(each.fault for each in found) else repair
        fault: Fault | None = Fault("corrupt", f"it is held {len(found)} times")
    elif found[0].fault:
        fault = Fault("corrupt", found[0].fault)
    else:
        fault = subject.fault(intent, found[0], pace)
    if fault is None:
        return None
    return Finding(fault.kind, key, intent.id, fault.why, repair, "" if repair else subject.advice)


def confirm(
    conn: psycopg.Connection[Any], subject: Subject, at: Tick, seen: Mapping[str, Sequence[Held]], pace: Pace
) -> Confirmed:
    """Look again at what these keys hold now; `seen` is what was found under each before."""
    if not seen:
        return Confirmed([], 0, {})
    # Cheap, and with much traffic nearly all of them; the next one reads the log.
    moving = in_motion(conn, subject.target, at, seen)
    settled = sorted(set(seen) - moving)
    if not settled:
        return Confirmed([], len(moving), {})
    expected = {intent.key: intent for intent in live.puts(conn, subject.target, at, keys=settled)}
    found = subject.look({key: seen[key] for key in settled})
    findings = [judge(subject, key, (expected.get(key), found.get(key, [])), pace) for key in settled]
    wrong = {finding.key: finding for finding in findings if finding is not None}
    late = in_motion(conn, subject.target, at, wrong)
    return Confirmed([wrong[key] for key in wrong if key not in late], len(moving) + len(late), expected)


def in_motion(conn: psycopg.Connection[Any], target: str, at: Tick, keys: Collection[str]) -> set[str]:
    """Those of `keys` of which something is parked, or has committed since `at`."""
    if not keys:
        return set()
    parameters = {
        "target": target,
        "keys": list(keys),
        "floor": at.floor,
        "first": at.first,
        "high": at.high,
        "snapshot": at.snapshot,
        "stragglers": [str(xid) for xid in sorted(at.seen.running)],
    }
    return {row[0] for row in conn.execute(sql.load("scrub_moving"), parameters)}
