"""The demonstration's saga: a folder is published as a whole, or nothing of it is left.

    manifest ─┐
              ├─ register ─ announce
    document ─┘

The engine finds it through OUTBOX_SAGAS, like any application's. About one folder in five is refused by `register`,
when its manifest is in the store and its document in the index already; `refused` says which, so that the check knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sqlalchemy.orm import Session

from outbox import Permanent, Saga
from outbox.saga.run import Action, Run
from workers.demo.model import Published

MODULE = __name__
"""For OUTBOX_SAGAS."""

HEADER = "X-Manifest"
"""Header of the mail with the manifest's digest: by it a mail is known as its folder's."""

REFUSE_EVERY = 5


@dataclass(frozen=True, slots=True)
class Listing:
    """A folder whose files are written: what the saga is started with."""

    path: str
    files: int
    #: The manifest, staged.
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def key(self) -> str:
        """Of its document."""
        return f"folder/{self.path}"


def refused(path: str) -> bool:
    """Whether a folder is one that fails on purpose."""
    return sha256(path.encode()).digest()[0] % REFUSE_EVERY == 0


publish = Saga("demo-publish", Listing)


@publish.intent
def manifest(run: Run[Listing]) -> Action:
    return run.blobs.put(run.input.manifest)


@manifest.undo
def withdraw_manifest(run: Run[Listing]) -> Action:
    # It names its folder, so no other one has the same content.
    return run.blobs.delete(run.input.digest)


@publish.intent(after=())
def document(run: Run[Listing]) -> Action:
    return run.index.put(run.input.key, title=run.input.path, data={"manifest": run.input.digest})


@document.undo
def withdraw_document(run: Run[Listing]) -> Action:
    return run.index.delete(run.input.key)


@publish.function(after=["manifest", "document"])
def register(session: Session, run: Run[Listing]) -> None:
    session.add(Published(path=run.input.path, digest=run.input.digest))
    session.flush()
    if refused(run.input.path):
        raise Permanent("this folder is refused on purpose")


@register.undo
def strike_off(session: Session, run: Run[Listing]) -> None:
    found = session.get(Published, run.input.path)
    if found is not None:
        session.delete(found)


@publish.mail(kind="pivot")
def announce(run: Run[Listing]) -> Action:
    return run.mail.send(
        sender="demo@outbox.example",
        to="you@outbox.example",
        subject=f"{run.input.files} files are published",
        text=f"The folder {run.input.path} is published.\n",
        headers={HEADER: run.input.digest},
    )


publish.check()
