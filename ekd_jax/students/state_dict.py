"""Names of arrays in a file of weights, without the names of whatever the network was wrapped in."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.students.weights_file import read_arrays

# A key or a prefix that consists of these words alone, such as "module", "model_state_dict" or "state_dict_ema", says
# nothing about the place of an array in the network.
_EMA = {"ema", "averaged", "average", "avg", "swa", "shadow"}
_TEACHER = {"teacher"}
_WRAPPERS = {
    *"module model models net network student backbone encoder base online orig mod fsdp wrapped".split(),
    *"state dict weights params parameters checkpoint ckpt best last final".split(),
    *_EMA,
    *_TEACHER,
}
# torch.compile and FSDP wrap modules inside of a network, too.
_INNER = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclasses.dataclass(frozen=True)
class StateDict:
    """The arrays of one network.

    Attributes:
        arrays: name -> array, as `model.state_dict()` has them.
        notes: what was chosen and what was left out, for people.
    """

    arrays: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()


def read_state_dict(path: pathlib.Path, ema: bool = False) -> StateDict:
    """Read the arrays of one network from a file of PyTorch weights.

    Args:
        path: a file of one of `weights_file.EXTENSIONS`: a bare state dict or a training checkpoint.
        ema: whether to take averaged (EMA) weights; otherwise plain ones are taken if there are both.

    Raises:
        UserError: it cannot be read, holds several networks, or no averaged weights with ema=True.
    """
    try:
        return unwrap(read_arrays(path), ema)
    except ValueError as error:
        raise UserError(f"--weights={path}: {error}") from error


def unwrap(arrays: Mapping[str, np.ndarray], ema: bool = False) -> StateDict:
    """Return the arrays of one network under its own names.

    Args:
        arrays: nested keys and names, joined by dots.
        ema: whether to take averaged (EMA) weights.

    Raises:
        ValueError: two networks, or no averaged weights with ema=True.
    """
    roles: dict[str, dict[str, np.ndarray]] = {"plain": {}, "EMA": {}, "teacher": {}}
    origins: dict[tuple[str, str], str] = {}
    whose = {full_name: _role_and_name(full_name) for full_name in arrays}
    wrapped = any(full_name.endswith(f".{name}") for full_name, (_, name) in whose.items())
    for full_name, array in arrays.items():
        role, name = whose[full_name]
        if wrapped and "." not in full_name:
            continue  # it is beside the network: a state of random numbers, an accuracy
        found = roles[role]
        if name in found and not np.array_equal(found[name], array, equal_nan=array.dtype.kind == "f"):
            raise ValueError(
                f"{origins[role, name]} and {full_name} differ, so it holds several networks: save one of them alone"
            )
        found[name], origins[role, name] = array, full_name
    networks = {role: found for role, found in roles.items() if any(a.ndim > 1 for a in found.values())}
    if ema and "EMA" not in networks:
        raise ValueError("--ema: it holds no averaged weights; leave the flag out")
    if not networks:
        raise ValueError(f"it holds no weights of a network, only {_listed(arrays)}")
    role = "EMA" if ema else next(iter(networks))
    return StateDict(networks[role], tuple(_notes(role, networks)))


def _role_and_name(full_name: str) -> tuple[str, str]:
    """Return whose array it is, a key of `roles` in `unwrap`, and its name in the network."""
    *path, last = full_name.split(".")
    outer = 0
    while outer < len(path) and (words := _words(path[outer])) and words <= _WRAPPERS:
        outer += 1
    words = set().union(*map(_words, path[:outer]))
    role = "EMA" if words & _EMA else "teacher" if words & _TEACHER else "plain"
    return role, ".".join([*(part for part in path[outer:] if part not in _INNER), last])


def _words(part: str) -> set[str]:
    return set(re.findall(r"[^_-]+", part.lower()))


def _notes(role: str, networks: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Return what to say about the choice of weights."""
    if role == "EMA":
        others = "the plain ones are there, too" if "plain" in networks else "there are no others"
        notes = [f"averaged (EMA) weights were taken; {others}"]
    else:
        notes = ["plain weights were taken; --ema takes the averaged ones"] if "EMA" in networks else []
    if role != "teacher" and "teacher" in networks:
        notes.append(f"{len(networks['teacher'])} arrays of a teacher were left out")
    return notes


def _listed(names: Mapping[str, np.ndarray]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
