"""`outbox work relay`: hand actors' messages on to dramatiq's own broker, RabbitMQ or Redis.

Called by `workers.cli.work`. Each queue is drained like a participant, in threads of this process; one thread more
takes what the far side tells. Raises `NotReady` for an address that can't be used, and for a queue that is worked
here.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

from outbox.actor import queue
from outbox.actor.broker import LANES
from outbox.actor.letter import target_of
from outbox.database import connect
from outbox.errors import NotReady, Unavailable
from outbox.participant import Participant
from outbox.settings import Settings
from workers import process
from workers.actor.relay import book
from workers.actor.relay.address import Address
from workers.actor.relay.link import open_link
from workers.actor.relay.participant import RelayParticipant
from workers.actor.relay.returns import Returns, queue_of

log = logging.getLogger("outbox.worker")


def run_relay(args: argparse.Namespace, settings: Settings, stop: process.Stop) -> None:
    """Until told to stop; at once, to give queues back."""
    queues = [target_of(name) for name in args.queue or settings.relay_queues]
    if args.give_back:
        _give_back(settings, queues)
        return
    if args.to is None and settings.relay is None:
        log.warning("relay: there is nowhere to relay to: name the broker in OUTBOX_RELAY")
        while not args.until_idle and not stop.wait(1.0):
            pass
        return
    # They print addresses, and every refused connection several times.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    address = Address.of(settings, args.to)
    link = partial(open_link, address, max_priority=settings.relay_max_priority)
    if address.in_the_clear:
        log.warning("relay: messages leave this machine without TLS: use amqps:// or rediss:// beyond your own network")
    link().close()  # a package that is missing is told at once
    if address.kind == "redis":
        _warn(address)
    with connect(settings.database, name="relay", patience=60.0) as conn:
        for target in queues:
            queue.declare(conn, target, LANES)
            if book.assign(conn, target, relayed=True):
                log.info("relay: %s is relayed from now on", target)
        queues = queues or book.targets(conn)
        returns = queue_of(conn)
    if not queues:
        raise NotReady("no queue is relayed: name one with --queue, or in OUTBOX_RELAY_QUEUES")
    _drain(settings, queues, lambda: RelayParticipant(settings, link(), returns), stop, until_idle=args.until_idle,
           listener=partial(Returns, settings, link(), returns))  # fmt: skip


def _give_back(settings: Settings, queues: Sequence[str]) -> None:
    if not queues:
        raise NotReady("name the queues that are worked here again: outbox work relay --give-back --queue default")
    with connect(settings.database, name="relay") as conn:
        for target in queues:
            news = book.assign(conn, target, relayed=False)
            print(f"{target} is worked here again." if news else f"{target} was not relayed.")


def _warn(address: Address) -> None:
    from workers.actor.relay.redis import Redis  # noqa: PLC0415 - only here with its package

    link = Redis(address)
    try:
        if weakness := link.weakness():
            log.warning("relay: %s", weakness)
    except Unavailable as error:
        log.warning("relay: %s", error)
    finally:
        link.close()


def _drain(
    settings: Settings,
    queues: Sequence[str],
    make: Callable[[], Participant],
    stop: process.Stop,
    *,
    until_idle: bool,
    listener: Callable[[threading.Event], Returns],
) -> None:
    """Drain all queues, each in a thread; the end of one that failed is the end of all."""
    ended = process.Turn(stop)
    failed: list[BaseException] = []

    def drain(target: str) -> None:
        try:
            process.run(settings, target, make, ended, until_idle=until_idle)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failed.append(error)
            ended.set()

    returns = listener(ended)
    returns.start()
    threads = [threading.Thread(target=drain, args=(target,), name=target) for target in queues]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    returns.join(10.0)
    if failed:
        raise failed[0]
