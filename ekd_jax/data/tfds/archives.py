"""Archives that the user provides: they must be there, and be the published ones."""

import hashlib
import pathlib

from ekd_jax.common.errors import UserError

SUMS = "SHA256SUMS"  # file of checksums beside the archives


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
    """Return the SHA-256 of each file that a file of checksums lists, by name."""
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        digest, _, name = line.strip().partition(" ")
        sums[name.lstrip(" *").removeprefix("./")] = digest.lower()
    return sums
