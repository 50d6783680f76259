"""Blobs in a bucket of the server that ignores conditions: everything again; and kills during the recovery, at both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from outbox.s3 import S3Store
from tests.fixtures.s3 import KINDS, Server, use
from tests.fixtures.site import Site
from tests.integration.test_blob_s3 import *  # noqa: F403 - its tests run here with the server below
from tests.integration.test_blob_s3_crash import WHERE, check_killed, s3_site

__all__ = ["s3_site"]

#: Points that the recovery passes again for certain. After the others, what was done may be done.
AGAIN = ("blob.uploaded", "blob.staged", "blob.marked", "blob.published")


@pytest.fixture(params=["rclone"])
def s3_server(
    request: pytest.FixtureRequest, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch
) -> Server:
    """The bad clone, where a test doesn't say which."""
    return use(servers(request.param), monkeypatch)


@pytest.mark.parametrize("s3_server", KINDS, indirect=True)
@pytest.mark.parametrize(("name", "times"), [*((name, 1) for name in WHERE), *((name, 2) for name in AGAIN)])
def test_s3_i2_i3_i11_loses_and_leaves_nothing_when_killed_there_again_and_again(
    s3_site: Site,
    app_url: str,
    worker: psycopg.Connection[Any],
    s3: S3Store,
    name: str,
    times: int,
) -> None:
    check_killed(s3_site, app_url, worker, s3, name, times)
