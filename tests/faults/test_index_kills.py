"""The index under kill -9 at any moment: every document must be what the log says last of its key.

Two shards, one worker process each, killed at random while applications write, and started again. Then each
document's digest is compared with the log, and each shard's position with the lanes.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from functools import partial

import psycopg
import pytest

from outbox.participant import LaneView
from outbox.position import Position
from tests.fixtures.site import LIMIT, Site, until
from tests.integration.test_index_shards import HALVES, digests, due
from workers.index import IndexParticipant

KILLS = 25
WRITERS = 3
KEYS = 150
"""Of each writer."""


def traffic(url: str, seed: int, stop: threading.Event) -> None:
    """Transactions of puts and deletes of few keys, so that the same ones come again and again.

    Each writer has keys of its own: nothing else would order the intents of one key, as its row's lock does elsewhere.
    """
    dice = random.Random(seed)
    with psycopg.connect(url) as conn:
        for number in itertools.count():
            if stop.is_set():
                return
            for _ in range(dice.randint(1, 12)):
                key = f"k{dice.randrange(KEYS)}/{seed}"
                if dice.random() < 0.15:
                    conn.execute("select outbox.emit('index', 'delete', %s)", (key,))
                else:
                    text = f"writer {seed} number {number} " + "some more words " * dice.randrange(60)
                    conn.execute(
                        "select outbox.emit('index', 'put', %s, jsonb_build_object('text', %s::text))", (key, text)
                    )
            if dice.random() < 0.1:
                conn.rollback()
            else:
                conn.commit()
            time.sleep(dice.random() * 0.01)


def holds(site: Site, lane: int, pid: int) -> bool:
    """Whether a process has had its lane: it may have lost it again, on a machine that stands still for a while."""
    place = site.one(f"select place from outbox.lane where target = 'index' and lane = {lane}")
    return place is not None and place.split("/")[3] == str(pid)


@pytest.mark.parametrize("seed", [1, 2])
def test_index_i2_i3_i4_i5_agrees_with_the_log_when_killed_at_random(site: Site, app_url: str, seed: int) -> None:
    # Given: two shards, their workers, and traffic
    site.admin.execute("select outbox.register('index', 2)")
    site.start("clock")
    dice = random.Random(seed)
    stop = threading.Event()
    writers = [threading.Thread(target=traffic, args=(app_url, seed * 100 + n, stop)) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    workers = {lane: site.start("index", "--lane", str(lane)) for lane in (0, 1)}
    killed: Counter[int] = Counter()
    try:
        # When: one of them is killed, again and again, once it has the lane that it is to lose
        while killed.total() < KILLS:
            lane = dice.randrange(2)
            until(partial(holds, site, lane, workers[lane].pid), "the worker has its lane")
            time.sleep(dice.random() * 0.15)
            workers[lane].kill()
            workers[lane].wait()
            killed[lane] += 1
            workers[lane] = site.start("index", "--lane", str(lane))
    finally:
        stop.set()
        for writer in writers:
            writer.join()
        for worker in workers.values():
            worker.kill()
            worker.wait()

    # Then: the next ones bring everything to its end (I10), and it is what the log says
    assert site.start("index", "--until-idle").wait(LIMIT) == 0
    assert min(killed.values()) > 0
    assert site.one("select count(*) from outbox.parked") == 0
    wanted = due(site)
    assert len(wanted) > KEYS / 4 * WRITERS
    assert digests(site) == wanted
    for lane, slots in enumerate(HALVES):
        participant = IndexParticipant(site.home / "index")
        participant.open(LaneView("index", lane, 10**6, unclean=False, slots=slots))
        position = participant.position()
        assert isinstance(position, Position)
        assert position.log == site.one("select log from outbox.identity")
        participant.close()
