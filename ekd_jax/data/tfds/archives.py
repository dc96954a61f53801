"""Archives that the user provides: they must be there, and be the published ones."""

import gzip
import hashlib
import pathlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from ekd_jax.common.errors import UserError, reason
from ekd_jax.common.files import read_bytes
from ekd_jax.common.text import printable

SUMS = "SHA256SUMS"  # file of checksums beside the archives
MAX_SUMS = 2**24  # bytes of that file
CHUNK = 4 << 20  # bytes that are read at a time


def find(folder: str, file: str) -> pathlib.Path:
    """Return the path of an archive in a directory.

    Raises:
        UserError: it is not there.
    """
    path = pathlib.Path(folder).expanduser() / file
    if not path.is_file():
        raise UserError(f"data.manual_dir={folder} holds no {file}: put it there")
    return path


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: pathlib.Path, found: str, published: str) -> None:
    """Compare an archive's SHA-256 with the published one and with the one in SHA256SUMS beside the archive.

    With that file, in the format of `sha256sum`, users vouch for archives of their own.

    Args:
        path: path of the archive.
        found: its SHA-256.
        published: the SHA-256 of the published archive.

    Raises:
        UserError: it is neither.
    """
    stated = _stated(path.parent / SUMS).get(path.name, published)
    if found not in (published, stated):
        raise UserError(
            f"{path} has the SHA-256 {found}, not {stated}: it is truncated, damaged or a different archive: "
            f"download it again, or, if you mean to use this one, add the line "
            f"'{found}  {path.name}' to {path.parent / SUMS}"
        )


def _stated(path: pathlib.Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a file of checksums lists, by name.

    Raises:
        UserError: it cannot be read.
    """
    sums: dict[str, str] = {}
    try:
        text = read_bytes(path, MAX_SUMS).decode()
    except FileNotFoundError:
        return sums
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): write it with sha256sum") from error
    for line in text.splitlines():
        digest, _, name = line.strip().partition(" ")
        sums[name.lstrip(" *").removeprefix("./")] = digest.lower()
    return sums


class ForwardReader:
    """Reads a file, or what a file unpacks to, once from start to end; seeking reads forward.

    Args:
        file: the file or the stream.
        path: of the file, for the error.
        limit: the most bytes that it may have.
    """

    def __init__(self, file: BinaryIO, path: pathlib.Path, limit: int):
        self.file, self.path, self.limit = file, path, limit
        self.position = 0

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self.position

    def read(self, size: int) -> bytes:
        """Return the next bytes, `size` if there are as many; raise UserError beyond the limit."""
        data = self.file.read(min(size, self.limit + 1 - self.position))
        self.position += len(data)
        if self.position > self.limit:
            raise too_large(self.path, self.limit)
        return data

    def seek(self, position: int) -> None:
        """Read up to a position; raise tarfile.ReadError if it is behind."""
        if position < self.position:
            raise tarfile.ReadError("files overlap")
        while (left := position - self.position) and self.read(min(left, CHUNK)):
            pass


def tar_members(file: ForwardReader) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of a tar that begins where the reader is, each with the tar to read it from.

    Directories are left out, and so is "./" in front of names. A member must be read before the next one is
    asked for. Headers are believed only as far as the limit of the reader allows.

    Raises:
        UserError: there is more than that limit.
        tarfile.TarError: the tar is damaged, or a member claims more bytes than there may be left.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            if not 0 <= member.size <= file.limit - member.offset_data:
                raise tarfile.ReadError(
                    f"{printable(member.name)} claims {member.size:,} bytes, above the limit of {file.limit:,} for all"
                )
            if not member.isdir():
                member.name = member.name.removeprefix("./")
                yield tar, member


def problem_of(member: tarfile.TarInfo) -> str:
    """Return why a member is no image or data file, "" if it is a file with all its bytes."""
    if not member.isreg() or member.issparse():
        return "is a link, a device or a sparse file"
    return "" if member.size else "is empty"


def gunzip(path: pathlib.Path, limit: int) -> bytes:
    """Return what a gzip file unpacks to.

    Raises:
        UserError: it is more than `limit` bytes.
        OSError, EOFError, zlib.error: it is damaged.
    """
    with gzip.open(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise too_large(path, limit)
    return data


def too_large(path: pathlib.Path, limit: int) -> UserError:
    """Return the error of an archive that unpacks to more than its data set has."""
    return UserError(
        f"{path} unpacks to more than {limit:,} bytes, and its data set has no more: it is damaged or a different "
        f"archive: download it again"
    )
