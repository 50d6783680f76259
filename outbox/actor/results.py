"""Results: what actors return, kept in Postgres until it runs out.

    results = OutboxResults(broker)
    broker.add_middleware(Results(backend=results))     # dramatiq.results.Results

A result that a worker stores is written in the transaction that acknowledges its message: there is never one without
the other, and it costs no commit of its own. With `broker.transaction()` it is in that transaction, if the actor says
it there (`broker.result(value)`); what it returns after the block is written down a few milliseconds later.

Results are JSON, by dramatiq's encoder or one's own, of at most `RESULT_LIMIT` bytes. One that isn't, or is larger, is
stored as the failure that it is, so that nobody waits for it in vain.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dramatiq.encoder import Encoder, PickleEncoder
from dramatiq.errors import ConnectionClosed
from dramatiq.results import Missing, ResultBackend, ResultMissing, Results, ResultTimeout
from dramatiq.results.backend import DEFAULT_TIMEOUT
from dramatiq.results.result import wrap_exception, wrap_result

from outbox import sql
from outbox.actor import bell
from outbox.actor.delivered import Delivered
from outbox.database import Connection
from outbox.errors import IntentRefused, PayloadInvalid, PayloadTooLarge

if TYPE_CHECKING:
    import dramatiq

    from outbox.actor.broker import OutboxBroker

logger = logging.getLogger("outbox.actor")

RESULT_LIMIT = 1024 * 1024
"""Bytes of a result. Whoever returns more puts a blob, and returns its key."""

TTL_MOST = 100 * 365 * 24 * 3600 * 1000
"""Milliseconds that a result is kept, at most: a hundred years, which Postgres can still reckon with."""

_NOT_JSON = "dramatiq's encoder doesn't write JSON, and results are nothing else: use dramatiq.JSONEncoder"


class Result(NamedTuple):
    """A result on its way into the database."""

    key: str
    #: JSON.
    value: str
    #: Milliseconds.
    ttl: int


class OutboxResults(ResultBackend):
    """A result backend in the database of a broker. Making one connects to nothing.

    Raises `PayloadInvalid` when the encoder is known to write something else than JSON.
    """

    def __init__(
        self,
        broker: OutboxBroker,
        *,
        namespace: str = "dramatiq-results",
        encoder: Encoder | None = None,
        use_namespace_prefix_keys: bool = False,
    ) -> None:
        super().__init__(
            namespace=namespace, encoder=encoder, use_namespace_prefix_keys=use_namespace_prefix_keys
        )  # fmt: skip
        if isinstance(self.encoder, PickleEncoder):
            raise PayloadInvalid(_NOT_JSON)
        self._broker = broker

    # ---------------------------------------------------------------------------------------- storing

    def store_result(self, message: dramatiq.Message[Any] | Delivered, result: Any, ttl: int) -> None:
        """Store what an actor returned: with its acknowledgement, or at once for any other message. `ttl`: ms."""
        self._keep(message, wrap_result(result), ttl)

    def store_exception(self, message: dramatiq.Message[Any] | Delivered, exception: BaseException, ttl: int) -> None:
        """Store why a message failed for good: `get_result` raises `ResultFailure` with it."""
        self._keep(message, wrap_exception(exception), ttl)

    def _keep(self, message: dramatiq.Message[Any] | Delivered, result: Any, ttl: int) -> None:
        key = self.build_message_key(message)
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= TTL_MOST:
            raise IntentRefused(f"the result_ttl of {message.actor_name} is not a number of milliseconds: give one")
        if not isinstance(message, Delivered) or message.broker is not self._broker:
            self._store(key, result, ttl)
        elif message.result is None:  # else the actor has said it in its transaction, or the message has failed
            try:
                value = self._text(result)
            except IntentRefused as error:
                logger.error("%s returned what can't be stored: %s", message.actor_name, error)  # noqa: TRY400
                value = self._text(wrap_exception(error))
            message.result = Result(key, value, ttl)

    def _store(self, message_key: str, result: Any, ttl: int) -> None:
        one = Result(message_key, self._text(result), ttl)
        self._broker.run(lambda conn: store(conn, [one]))

    def _text(self, result: Any) -> str:
        try:
            data = self.encoder.encode(result)
        except (TypeError, ValueError, RecursionError) as error:
            raise PayloadInvalid("the result is not JSON: return strings, numbers, lists and dicts") from error
        try:
            text = data.decode()
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PayloadInvalid(_NOT_JSON) from error
        if len(data) > RESULT_LIMIT:
            raise PayloadTooLarge(
                f"the result has more than {RESULT_LIMIT} bytes: put it as a blob, and return the blob's key"
            )
        return text

    # ---------------------------------------------------------------------------------------- getting

    def get_result(
        self,
        message: dramatiq.Message[Any],
        *,
        block: bool = False,
        timeout: int | None = None,
        forget: bool = False,
    ) -> Any:
        """The result of a message. `block`: wait for it, at most `timeout` milliseconds (10 s), on a connection of its
        own, without asking again and again. `forget`: remove it as well.

        Raises `ResultMissing`, `ResultTimeout`, `ResultFailure`, and dramatiq's errors for connections.
        """
        key = self.build_message_key(message)
        seconds = (DEFAULT_TIMEOUT if timeout is None else timeout) / 1000
        text = self._wait(key, "result_forget" if forget else "result_get", seconds if block else 0.0)
        if text is None:
            raise (ResultTimeout if block else ResultMissing)(message)
        return self.unwrap_result(self.encoder.decode(text.encode()))  # type: ignore[no-untyped-call]

    def _get(self, message_key: str) -> Any:
        text = self._wait(message_key, "result_get", 0.0)
        return Missing if text is None else self.encoder.decode(text.encode())

    def _wait(self, key: str, statement: str, seconds: float) -> str | None:
        def look(conn: Connection) -> str | None:
            row = conn.execute(sql.load(statement), {"key": key}).fetchone()
            return None if row is None else str(row[0])

        if not seconds:
            return self._broker.run(look)
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                return self._broker.run(lambda conn: bell.wait(conn, key, lambda: look(conn), left))  # noqa: B023
            except ConnectionClosed:
                # The server was restarted, or the network hiccuped: whoever waits can go on waiting.
                if not left:
                    raise


def store(conn: Connection, results: list[Result], *, rings: bool = True) -> None:
    """Store results, in the transaction that `conn` is in. Of several with one key, the last."""
    latest = {result.key: result for result in results}
    conn.execute(sql.load("result_store"), parameters(list(latest.values()), rings=rings))


def parameters(results: list[Result], *, rings: bool) -> dict[str, Any]:
    """`results`, whose keys are distinct, as the parameters of `result_store.sql`."""
    return {
        "keys": [result.key for result in results],
        "values": [result.value for result in results],
        "ttls": [result.ttl / 1000 for result in results],
        "rings": rings,
    }


def tell(broker: OutboxBroker, message: Delivered, value: Any) -> None:
    """Have the broker's middleware say what a message's result is."""
    for one in _middleware(broker):
        one.after_process_message(broker, message, result=value)


def fail(broker: OutboxBroker, message: Delivered) -> None:
    """A message has failed for good. dramatiq stores why only after it has given the message back: too late to go with
    that."""
    for one in _middleware(broker):
        try:
            one.after_nack(broker, message)
        except Exception as error:  # noqa: BLE001 - as of all middleware: the message comes first
            logger.warning("the failure of intent %d can't be stored (%s)", message.id, type(error).__name__)


def _middleware(broker: OutboxBroker) -> list[Results]:
    return [m for m in broker.middleware if isinstance(m, Results) and isinstance(m.backend, OutboxResults)]
