"""One S3 bucket, by boto3: the few operations that blobs need, below a prefix.

`outbox.s3` and `workers.s3` call it, and `outbox.endpoint` tries it. Credentials come from boto3's own chain
(environment, files, the machine's role), and never from a URL. What `put`, `upload` and `copy` made is durable when
they return: S3 answers after it has stored.

An upload that fails is aborted, so that no parts are left to be paid for. boto3 repeats requests by itself; every
operation here may be repeated, as keys are never used for two different contents.

Errors: `Unavailable` when the endpoint can't be reached or refuses, with S3's code and without addresses; `NotReady`
for a bucket that can't be one, and without boto3.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple

from outbox.errors import NotReady, Unavailable
from outbox.failpoint import hit

try:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError
except ImportError:
    raise NotReady("blobs in S3 need boto3: pip install 'postgres-outbox[s3]'") from None

COPY_WHOLE = 1024**3
"""Bytes that one request copies; larger objects are copied in parts, so that no request takes minutes. S3's own limit
is 5 GiB."""

COPY_PART = 256 * 1024**2
"""Bytes of a part of a copy."""

_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([A-Za-z0-9!_.*'()/-]*))?")
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?/?|https?://\[[0-9a-fA-F:]+\](:\d+)?/?")
_GONE = ("NoSuchKey", "404", "NotFound")

# Checksums are sent where this code says so: as trailers, which boto3 adds otherwise, they confuse many servers.
_CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 120,
    "retries": {"mode": "standard", "total_max_attempts": 4},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "max_pool_connections": 16,
}


class Entry(NamedTuple):
    """An object."""

    key: str
    size: int
    modified: datetime


class Upload(NamedTuple):
    """An upload in parts that is not complete."""

    key: str
    id: str
    initiated: datetime


class Bucket:
    """A bucket and a prefix in it; keys are relative to that. Threads may share it."""

    def __init__(self, url: str, endpoint: str | None = None, *, setting: str = "OUTBOX_BLOBS") -> None:
        """`url` is `s3://BUCKET/PREFIX`, from `setting`. Nothing is asked yet. Raises `NotReady` when it has another
        shape."""
        found = _URL.fullmatch(url)
        # Neither is repeated in the error: somebody may have written a password into it.
        if not found:
            raise NotReady(
                f"{setting} is not a bucket: write s3://BUCKET/PREFIX; credentials are boto3's own business "
                "(AWS_ACCESS_KEY_ID, ~/.aws, the machine's role)"
            )
        if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
            raise NotReady("OUTBOX_S3_ENDPOINT is not a server: write http(s)://HOST:PORT, without user and path")
        self.name = found[1]
        prefix = (found[2] or "").strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._client: Any = None

    @property
    def client(self) -> Any:
        """boto3's client, made when it is first needed."""
        with self._lock:
            if self._client is None:
                # Servers of one's own rarely have a name for each bucket.
                style = {"s3": {"addressing_style": "path"}} if self._endpoint else {}
                with _trouble():
                    self._client = boto3.session.Session().client(
                        "s3", endpoint_url=self._endpoint, config=Config(**_CONFIG, **style)
                    )
            return self._client

    def where(self, key: str) -> dict[str, str]:
        """The arguments that name an object to boto3."""
        return {"Bucket": self.name, "Key": self._prefix + key}

    # ------------------------------------------------------------------------------------------ writing

    def put(self, key: str, content: bytes | bytearray, **more: Any) -> None:
        """Make an object in one request. `more` are boto3's arguments."""
        with _trouble():
            self.client.put_object(**self.where(key), Body=content, **{"ChecksumSHA256": checksum(content)} | more)

    def upload(self, key: str, parts: Iterable[bytes | bytearray]) -> None:
        """Make an object in parts (each 5 MiB at least, except the last). Nothing is left of it if that fails."""
        with _trouble():
            id_ = self.client.create_multipart_upload(**self.where(key), ChecksumAlgorithm="SHA256")["UploadId"]
        with self._aborted(key, id_):
            made, size = [], 0
            for number, part in enumerate(parts, 1):
                size += len(part)
                named = {"PartNumber": number, "ChecksumSHA256": checksum(part)}
                with _trouble():
                    answer = self.client.upload_part(**self.where(key), UploadId=id_, Body=part, **named)
                made.append({"ETag": answer["ETag"], **named})
            hit("blob.uploaded")
            self._complete(key, id_, made, size)

    def copy(self, source: str, key: str, metadata: Mapping[str, str]) -> bool:
        """Copy an object on the server, in one request. → False if there is no such object."""
        try:
            with _trouble():
                self.client.copy_object(
                    **self.where(key), CopySource=self.where(source), MetadataDirective="REPLACE", Metadata=metadata
                )
        except Gone:
            return False
        return True

    def copy_parts(self, source: str, key: str, size: int, metadata: Mapping[str, str], part: int = COPY_PART) -> bool:
        """Copy an object of `size` bytes on the server, in parts. → False if there is no such object."""
        try:
            with _trouble():
                id_ = self.client.create_multipart_upload(**self.where(key), Metadata=metadata)["UploadId"]
                with self._aborted(key, id_):
                    made = []
                    for number, start in enumerate(range(0, size, part), 1):
                        answer = self.client.upload_part_copy(
                            **self.where(key),
                            UploadId=id_,
                            PartNumber=number,
                            CopySource=self.where(source),
                            CopySourceRange=f"bytes={start}-{min(size, start + part) - 1}",
                        )
                        # A server that doesn't know this request may take it for an empty part.
                        tag = answer.get("CopyPartResult", {}).get("ETag")
                        if not tag:
                            raise _refused("no copies in parts")
                        made.append({"ETag": tag, "PartNumber": number})
                    self._complete(key, id_, made, size)
        except Gone:
            return False
        return True

    def _complete(self, key: str, id_: str, made: list[dict[str, Any]], size: int) -> None:
        try:
            with _trouble():
                self.client.complete_multipart_upload(**self.where(key), UploadId=id_, MultipartUpload={"Parts": made})
        except UploadGone:
            # boto3 has repeated a request whose answer was lost: the first one did it.
            if self.size(key) != size:
                raise

    @contextmanager
    def _aborted(self, key: str, id_: str) -> Iterator[None]:
        """Abort the upload if the block fails."""
        try:
            yield
        except BaseException:
            with suppress(Unavailable):
                self.abort(key, id_)
            raise

    def abort(self, key: str, id_: str) -> None:
        """Give an upload up, with its parts. It may be gone."""
        with suppress(UploadGone), _trouble():
            self.client.abort_multipart_upload(**self.where(key), UploadId=id_)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; they may be gone. 1,000 at most."""
        found = [{"Key": self._prefix + key} for key in keys]
        if not found:
            return
        with _trouble():
            answer = self.client.delete_objects(Bucket=self.name, Delete={"Objects": found, "Quiet": True})
        for error in answer.get("Errors", []):
            raise _refused(str(error.get("Code")))

    # ------------------------------------------------------------------------------------------ reading

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        try:
            with _trouble():
                return int(self.client.head_object(**self.where(key))["ContentLength"])
        except Gone:
            return None

    def get(self, key: str) -> bytes | None:
        """The content of a small object; None if there is none."""
        try:
            with _trouble():
                return bytes(self.client.get_object(**self.where(key))["Body"].read())
        except Gone:
            return None

    def body(self, key: str, start: int) -> Any:
        """The content of an object from a byte on, as a stream. Raises `Gone`."""
        with _trouble():
            return self.client.get_object(**self.where(key), Range=f"bytes={start}-")["Body"]

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose key begins so, in the order of keys."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self._prefix + prefix)
        with _trouble():
            for page in pages:
                for found in page.get("Contents", []):
                    yield Entry(found["Key"].removeprefix(self._prefix), int(found["Size"]), found["LastModified"])

    def uploads(self, prefix: str) -> Iterator[Upload]:
        """Every upload in parts that is not complete, whose key begins so."""
        pages = self.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.name, Prefix=self._prefix + prefix
        )
        with _trouble():
            for page in pages:
                for found in page.get("Uploads", []):
                    yield Upload(found["Key"].removeprefix(self._prefix), found["UploadId"], found["Initiated"])


class Gone(Exception):
    """The object isn't there. Never leaves the modules of S3."""


class UploadGone(Unavailable):
    """The upload isn't there: it was completed, or somebody has aborted it."""


class Object(io.RawIOBase):
    """An object as a file that can be read from any place. A stream that breaks off is taken up where it was: the
    object never changes. Raises OSError when that doesn't help."""

    def __init__(self, bucket: Bucket, key: str, size: int) -> None:
        self._bucket, self._key, self._size = bucket, key, size
        self._at = 0
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError("a file has no place before its beginning")
        if at != self._at:
            self._drop()
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._at >= self._size or not view:
            return 0
        for last in (False, True):
            try:
                if self._body is None:
                    self._body = self._bucket.body(self._key, self._at)
                with _trouble():
                    piece = self._body.read(len(view))
            except (Gone, Unavailable) as error:
                self._drop()
                if last or isinstance(error, Gone):
                    raise OSError(f"the blob can't be read to its end ({error})") from None
            else:
                if piece:
                    view[: len(piece)] = piece
                    self._at += len(piece)
                    return len(piece)
                self._drop()
        raise OSError("the blob ended before its size: the S3 endpoint closed the connection")

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None


def checksum(content: bytes | bytearray) -> str:
    """sha256 as S3 writes it."""
    return b64encode(hashlib.sha256(content).digest()).decode()


@contextmanager
def _trouble() -> Iterator[None]:
    """boto3's errors in our words; S3's code is said, keys and addresses are not."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))
        if code in _GONE:
            raise Gone from None
        if code == "NoSuchUpload":
            raise UploadGone("an upload in parts was aborted while it was made: look for who does that") from None
        raise _refused(code) from None
    except NoCredentialsError:
        raise Unavailable("there are no credentials for S3: give them to boto3 (AWS_ACCESS_KEY_ID, a role)") from None
    except (BotoCoreError, HTTPClientError) as error:
        raise Unavailable(f"the S3 endpoint can't be reached ({type(error).__name__}): look at it") from None


def _refused(code: str) -> Unavailable:
    return Unavailable(f"the S3 endpoint refuses ({code}): look at the bucket, the credentials and their rights")
