"""The rows of the demonstration's application."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class File(Base):
    __tablename__ = "demo_file"
    path: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    size: Mapped[int] = mapped_column(sa.BigInteger)


class Folder(Base):
    __tablename__ = "demo_folder"
    path: Mapped[str] = mapped_column(primary_key=True)
    files: Mapped[int]


class Published(Base):
    """Written by a step of the saga, and only there."""

    __tablename__ = "demo_published"
    path: Mapped[str] = mapped_column(primary_key=True)
    #: Of the folder's manifest.
    digest: Mapped[str]
