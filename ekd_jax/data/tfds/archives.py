"""Archives that a user brings: there, and the ones that they are taken for."""

import hashlib
import pathlib

from ekd_jax.common.errors import UserError

SUMS = "SHA256SUMS"


def find(folder: str, file: str) -> pathlib.Path:
    """The archive `file` of a folder.

    Raises:
        UserError: it is not there.
    """
    path = pathlib.Path(folder).expanduser() / file
    if not path.is_file():
        raise UserError(f"data.manual_dir={folder} holds no {file}")
    return path


def sha256(path: pathlib.Path) -> str:
    """Of a whole file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: pathlib.Path, found: str, published: str) -> None:
    """Compares an archive's SHA-256 with the published one and the one that SHA256SUMS beside it states.

    With that file, written as by `sha256sum`, a user vouches for an archive of their own.

    Args:
        path: of the archive.
        found: its SHA-256.
        published: what it should be.

    Raises:
        UserError: it is neither.
    """
    stated = _stated(path.parent / SUMS).get(path.name, published)
    if found not in (published, stated):
        raise UserError(
            f"{path} has the SHA-256 {found}, expected {stated}: it is truncated, damaged or another one: "
            f"download it again; if it is meant to be another one, add the line "
            f"'{found}  {path.name}' to {path.parent / SUMS}"
        )


def _stated(path: pathlib.Path) -> dict[str, str]:
    """File name -> SHA-256."""
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        digest, _, name = line.strip().partition(" ")
        sums[name.lstrip(" *").removeprefix("./")] = digest.lower()
    return sums
