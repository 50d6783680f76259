"""A worker is suspended at the worst moments, beyond its lease, and wakes up after another has taken over."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter

import pytest

from tests.fixtures.postfix import Postfix
from tests.fixtures.site import LIMIT, until
from tests.fixtures.zombie import House, is_suspended, wake

MOMENTS = [
    # With Xapian's own lock in hand: the next owner waits for it, and is told so by `outbox status`.
    *(("index", at) for at in ("index.documents", "index.committed", "reader.applied", "lane.advanced")),
    # Inside the lane's lock file: the same.
    ("blob", "blob.put"),
    *(("blob", at) for at in ("blob.linked", "blob.published", "reader.applied", "lane.advanced", "reader.settled")),
    # `lane.advanced` is inside the transaction that holds the lane's row.
    *(("mail", at) for at in ("receipt.opened", "mail.submitted:3", "reader.applied", "lane.advanced")),
    *(("ledger", at) for at in ("receipt.opened", "", "reader.applied", "reader.settled")),
]


@pytest.mark.parametrize(("target", "at"), MOMENTS)
def test_zombie_i3_i6_changes_nothing_when_it_wakes_after_a_takeover(house: House, target: str, at: str) -> None:
    # Given: an owner that is suspended in the middle of its work
    house.start("clock")
    names = [f"{target}{n}" for n in range(6)]
    house.emit(target, *names)
    zombie = house.start(target, at=at) if at else house.start(target, LEDGER_STOP="3")
    until(lambda: is_suspended(zombie), f"{target} is suspended at {at}")

    # When: its lease runs out, another takes over and goes on, and it wakes up
    successor = house.start(target)
    until(lambda: house.owner(target) == successor.pid, "the lane has another owner")
    if target == "index" or at == "blob.put":
        until(lambda: "another process" in house.waits_for(target), "the next owner waits for the lock")
    else:
        house.drained(target, *names)
    wake(zombie)

    # Then: everything is there once, and nothing was written under the old epoch
    house.drained(target, *names)
    assert house.never_went_back()

    # And: it lives on, and takes the lane again when that is free
    successor.terminate()
    assert successor.wait(LIMIT) == 0
    house.emit(target, "last")
    house.drained(target, *names, "last")
    assert house.owner(target) == zombie.pid
    zombie.terminate()
    assert zombie.wait(LIMIT) == 0
    assert house.never_went_back()
    assert house.effects(target) == Counter([*names, "last"])


def test_zombie_i10_holds_nobody_up_when_it_is_killed_in_its_sleep(house: House) -> None:
    # Given: an owner suspended with Xapian's lock in hand, and another that waits for it
    house.start("clock")
    house.emit("index", "a", "b")
    zombie = house.start("index", at="index.documents")
    until(lambda: is_suspended(zombie), "the index worker is suspended")
    house.start("index")
    until(lambda: "another process writes" in house.waits_for("index"), "the next owner waits")

    # When
    zombie.kill()

    # Then
    house.drained("index", "a", "b")


def test_zombie_i6_clock_takes_no_tick_when_it_wakes_after_a_takeover(house: House) -> None:
    # Given: a clock that is suspended when it has just taken a tick, and another that goes on
    house.start("index")
    house.emit("index", "a")
    zombie = house.start("clock", at="tick.taken:2")
    house.drained("index", "a")
    house.emit("index", "b")
    until(lambda: is_suspended(zombie), "the clock is suspended")
    successor = house.start("clock")
    until(lambda: house.owner("clock") == successor.pid, "there is another clock")
    house.emit("index", "c")
    house.drained("index", "a", "b", "c")

    # When
    wake(zombie)
    house.emit("index", "d")
    house.drained("index", "a", "b", "c", "d")
    successor.terminate()
    assert successor.wait(LIMIT) == 0
    house.emit("index", "e")

    # Then: the ticks are of one owner after the other, each with a nonce of its own
    house.drained("index", "a", "b", "c", "d", "e")
    assert house.owner("clock") == zombie.pid
    nonces = [row[0] for row in house.site.admin.execute("select nonce from outbox.tick where id > 1 order by id")]
    runs = [nonce for n, nonce in enumerate(nonces) if n == 0 or nonces[n - 1] != nonce]
    assert len(runs) == len(set(runs)) >= 3


@pytest.mark.root
def test_zombie_i3_sends_no_mail_twice_when_the_server_knows_no_epochs(house: House, postfix: Postfix) -> None:
    # Given: a real Postfix, and a worker suspended after the second of six mails, its session open
    environment = {"OUTBOX_SMTP": postfix.url, "OUTBOX_MAIL_EVIDENCE": postfix.evidence}
    house.start("clock")
    house.emit("mail", *(f"{n}" for n in range(6)))
    tokens = [row[0] for row in house.site.admin.execute("select payload->>'token' from outbox.log order by id")]
    zombie = house.start("mail", at="mail.submitted:2", **environment)
    until(lambda: is_suspended(zombie), "the mail worker is suspended")

    # When: another sends the rest, and the zombie wakes up with four mails in hand
    successor = house.start("mail", **environment)
    until(lambda: all(postfix.taken(token) for token in tokens), "Postfix has all six")
    until(lambda: house.reached("mail"), "and they are recorded")
    wake(zombie)
    successor.terminate()
    assert successor.wait(LIMIT) == 0
    house.emit("mail", "last")
    until(lambda: house.reached("mail"), "the zombie goes on with a new claim")

    # Then
    assert house.owner("mail") == zombie.pid
    assert [postfix.taken(token) for token in tokens] == [1] * 6


def test_zombies_i1_i2_i3_i6_i10_everything_comes_once_when_workers_are_suspended_at_random(house: House) -> None:
    # Given: two workers of each kind, and traffic
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    targets = ("index", "blob", "mail", "ledger")
    workers: list[subprocess.Popen[str]] = [house.start(t) for t in ("clock", *targets) for _ in range(2)]
    emitted: dict[str, list[str]] = {target: [] for target in targets}

    # When: any of them is suspended for up to two leases, again and again
    asleep: dict[subprocess.Popen[str], float] = {}
    for round_ in range(60):
        for target in targets:
            emitted[target].append(f"{target}-{round_}")
            house.emit(target, emitted[target][-1])
        for worker, until_when in list(asleep.items()):
            if time.monotonic() > until_when:
                wake(worker)
                del asleep[worker]
        victim = chance.choice(workers)
        if victim not in asleep:
            victim.send_signal(signal.SIGSTOP)
            asleep[victim] = time.monotonic() + chance.uniform(0.5, 4.0)
        time.sleep(0.3)  # the pace of the nemesis, nothing is waited for
    for worker in asleep:
        wake(worker)

    # Then: whoever owns what, everything drains, once
    for target in targets:
        house.drained(target, *emitted[target])
    assert house.never_went_back()
    assert all(worker.poll() is None for worker in workers)
    assert max(house.epoch(target) for target in ("clock", *targets)) > 1
    for worker in workers:
        worker.terminate()
    assert [worker.wait(LIMIT) for worker in workers] == [0] * len(workers)
