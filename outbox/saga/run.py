"""What the functions of a saga are given: the saga's input, the results so far, and the makers of intents.

A maker returns an `Intent` and writes nothing: the engine appends it to the log in the transaction that arms the step.
The makers mirror the verbs of `outbox.session`, without the session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID, uuid4

from outbox.document import document
from outbox.intent import Intent
from outbox.message import message_payload

Input = TypeVar("Input")


class Action(NamedTuple):
    """An intent, and what later steps are told about it: the step's result once it is done."""

    intent: Intent
    result: Any = None


class IndexMaker:
    """`run.index`: makers for the search index."""

    def put(self, key: str, **parts: Any) -> Action:
        """Make the document of `key` searchable; `parts` as for `outbox.index.put`."""
        return Action(Intent.make("index", "put", key, document(**parts)), {"key": key})

    def delete(self, key: str) -> Action:
        """Remove the document of `key`, if there is one."""
        return Action(Intent.make("index", "delete", key, {}), {"key": key})


class BlobMaker:
    """`run.blobs`: makers for the blob store."""

    def put(self, staged: Mapping[str, Any]) -> Action:
        """Publish what `outbox.blobs.stage` returned, which came here with the saga's input."""
        return Action(Intent.make("blob", "put", str(staged["digest"]), dict(staged)), {"digest": staged["digest"]})

    def delete(self, digest: str) -> Action:
        """Remove a blob. Others may name the same content: that is for the application to know."""
        return Action(Intent.make("blob", "delete", digest, {"digest": digest}), {"digest": digest})


class MailMaker:
    """`run.mail`: a maker for mail."""

    def __init__(self, domain: str) -> None:
        self._domain = domain

    def send(self, *, key: str | None = None, **parts: Any) -> Action:
        """Send a mail; `parts` as for `outbox.mail.send`. Rendered once, when the step is armed."""
        made = message_payload(domain=self._domain, **parts)
        return Action(Intent.make("mail", "send", key or str(uuid4()), made), {"message_id": made["message_id"]})


@dataclass(frozen=True, slots=True)
class Run(Generic[Input]):
    """One run of a saga, as its functions see it."""

    #: The saga's id: give it to `outbox.signal`, or use it as an idempotency key elsewhere.
    id: UUID
    #: What the saga was started with.
    input: Input
    #: Name of a step → its result. A function's is what it returned, a signal's its payload.
    results: Mapping[str, Any]
    #: Why it goes back; empty on the way forward.
    reason: str
    index: IndexMaker
    blobs: BlobMaker
    mail: MailMaker

    @staticmethod
    def emit(target: str, action: str, key: str, payload: Any = None) -> Action:
        """An intent for any other participant."""
        return Action(Intent.make(target, action, key, {} if payload is None else payload))
