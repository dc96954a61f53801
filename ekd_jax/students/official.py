"""Files that the official code of the ensemble method writes: a base block and one branch for each student."""

import pathlib
import re

from ekd_jax.common.errors import UserError
from ekd_jax.students.state_dict import StateDict, read_state_dict

BASE, ALONE = "BaseNet.pth", "Non_BaseNet.pth"  # a single student's branch is in `ALONE`


def is_official(path: pathlib.Path) -> bool:
    """Return whether it is a directory that the official code wrote."""
    return (path / BASE).is_file()


def read_official(path: pathlib.Path) -> list[StateDict]:
    """Return the arrays of every student's whole network, the first student's first.

    The official code numbers students from 0, so student_0.pth is student 1.

    Args:
        path: directory with BaseNet.pth, and student_0.pth, student_1.pth, ... or Non_BaseNet.pth.

    Raises:
        UserError: a file is missing or cannot be read, or base and branch have arrays of one name.
    """
    base = read_state_dict(path / BASE)
    return [_joined(path / BASE, base, branch) for branch in _branches(path)]


def _branches(path: pathlib.Path) -> list[pathlib.Path]:
    found = {
        int(name[1]): file
        for file in path.iterdir()
        if (name := re.fullmatch(r"student_(\d+)\.pth", file.name))
    }
    if (path / ALONE).is_file() and not found:
        return [path / ALONE]
    first = min(found, default=0)
    missing = sorted({*range(min(first, 1), max(found, default=0) + 1)} - found.keys())
    if missing:
        raise UserError(f"--weights={path} has {BASE}, but no student_{missing[0]}.pth beside it")
    return [found[number] for number in sorted(found)]


def _joined(base_file: pathlib.Path, base: StateDict, branch_file: pathlib.Path) -> StateDict:
    branch = read_state_dict(branch_file)
    both = {
        name
        for name in base.arrays.keys() & branch.arrays.keys()
        if not name.endswith("num_batches_tracked")
    }
    if both:
        raise UserError(
            f"--weights={base_file.parent}: {min(both)} is in {base_file.name} and in {branch_file.name}: they are "
            f"not a base block and a branch of it"
        )
    return StateDict(base.arrays | branch.arrays, tuple(dict.fromkeys((*base.notes, *branch.notes))))
