"""The finished adapter: from the server to a verified archive on disk, resumed where it broke off."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx

from finetune.errors import RemoteError, TrainingError, full_disk_named
from finetune.publishing import sha256_file, write_json_atomically
from resources.h2o.client import H2OClient, PassingFailureError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def download(
    client: H2OClient,
    route: str,
    target: Path,
    *,
    sha256: str | None,
    limit_bytes: int,
    on_bytes: Callable[[int, int | None], None],
) -> None:
    """Make `target` the archive behind `route`.

    What has arrived is kept in ``<target>.part``. It is continued by Range where its entity tag or
    `sha256` will show a change of the archive in between; else the download starts anew.

    Args:
        client: the connection.
        route: where the archive is.
        target: where it shall lie; its directory exists.
        sha256: what the server says that the archive's SHA-256 is.
        limit_bytes: a larger archive is refused.
        on_bytes: told of bytes done and bytes in all.

    Raises:
        RemoteError: the server does not deliver, or delivers other bytes twice.
        TrainingError: the archive is too large, or the server does not know it.
        StorageFullError: the disk is full.
    """
    part = target.with_name(f"{target.name}.part")
    with full_disk_named(target):
        for _ in range(2):
            whole = _fetch(client, route, part, sha256=sha256, limit_bytes=limit_bytes, on_bytes=on_bytes)
            found = sha256_file(part)
            if whole in (None, found):
                part.replace(target)
                _tag_path(part).unlink(missing_ok=True)
                return
            part.unlink()
    raise RemoteError(
        f"the H2O server delivered an adapter with SHA-256 {found} instead of {whole}, twice",
        where=client.api_url,
        remedy="Look whether something between here and the server changes what it sends, then run again",
    )


def _fetch(
    client: H2OClient,
    route: str,
    part: Path,
    *,
    sha256: str | None,
    limit_bytes: int,
    on_bytes: Callable[[int, int | None], None],
) -> str | None:
    """Fill `part`; returns the SHA-256 that it must have, if the server told one."""
    while True:
        size_before = _size(part)
        try:
            return client.repeated(lambda: _one_answer(client, route, part, sha256, limit_bytes, on_bytes))
        except RemoteError:
            # A budget is for an outage; a line that breaks now and then but brings something is none.
            if _size(part) <= size_before:
                raise


def _one_answer(
    client: H2OClient,
    route: str,
    part: Path,
    sha256: str | None,
    limit_bytes: int,
    on_bytes: Callable[[int, int | None], None],
) -> str | None:
    tag = _read_tag(part)
    have = _size(part) if tag or sha256 else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and tag:
        headers["If-Range"] = tag
    with client.stream(route, headers) as response:
        if response.status_code == 416:
            # Everything is here already, or what is here belongs to something else: the hash tells.
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return sha256
            part.unlink(missing_ok=True)
            raise PassingFailureError("the server cannot continue the download")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise PassingFailureError("the server compresses the download against our wish", malformed=True)
        start, total = _extent(response, have)
        if (total or 0) > limit_bytes:
            raise _too_large(client, total or 0, limit_bytes)
        _write_tag(part, response)
        done = start
        with part.open("r+b" if start else "wb") as file:
            if start:
                file.seek(start)
                file.truncate()
            # Pieces as they come: one that waits to be filled up is lost when the line breaks.
            for piece in response.iter_raw():
                file.write(piece)
                done += len(piece)
                if done > limit_bytes:
                    raise _too_large(client, done, limit_bytes)
                on_bytes(done, total)
        if total is not None and done != total:
            raise PassingFailureError(f"the download ended after {done} of {total} bytes")
        return sha256 or _announced_sha256(response)


def _extent(response: httpx.Response, have: int) -> tuple[int, int | None]:
    """Where the body starts, and how large the archive is in all."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length")
        return 0, int(length) if length else None
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) > have:
        raise PassingFailureError("a partial answer with an unusable Content-Range", malformed=True)
    return int(match[1]), None if match[3] == "*" else int(match[3])


def _announced_sha256(response: httpx.Response) -> str | None:
    value = response.headers.get("X-Checksum-Sha256", "").strip().lower()
    return value if re.fullmatch(r"[0-9a-f]{64}", value) else None


def _too_large(client: H2OClient, size: int, limit: int) -> TrainingError:
    return TrainingError(
        f"the adapter's archive has {size} bytes or more, over the limit of {limit}",
        where=client.api_url,
        remedy="Raise H2O_LIMITS' download_bytes if that is right",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_tag(part: Path) -> str | None:
    try:
        tag = json.loads(_tag_path(part).read_bytes())["etag"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tag if isinstance(tag, str) else None


def _write_tag(part: Path, response: httpx.Response) -> None:
    tag = response.headers.get("ETag")
    # RFC 9110, 13.1.5: a weak tag cannot vouch for a range; httpx sends ASCII alone.
    if tag and tag.isascii() and not tag.startswith("W/"):
        if tag != _read_tag(part):
            write_json_atomically(_tag_path(part), {"etag": tag})
    else:
        _tag_path(part).unlink(missing_ok=True)
