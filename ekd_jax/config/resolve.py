"""Every knob once: its default, what it means, and which values make sense.

A recipe (a file of `configs/`) starts from `default()` and changes what it must. `resolve` turns
what the user asked for into the complete, checked configuration that a run stores and obeys.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.config.knobs import KNOBS, _nest, method_fields


def resolve(config: Mapping[str, Any], overridden: Iterable[str] = ()) -> FrozenConfigDict:
    """The complete configuration, checked.

    Args:
        config: a recipe's, with the command line's changes.
        overridden: dotted names that the command line set. When `method.name` is among them, the
            recipe's other method knobs belonged to another method and give way to the defaults.

    Raises:
        UserError: an unknown knob, a value of the wrong type or out of range.
    """
    asked = _flatten(config)
    overridden = set(overridden)
    method = asked.get("method.name", KNOBS["method.name"].default)
    _check("method.name", method)
    if "method.name" in overridden:
        asked = {k: v for k, v in asked.items() if not k.startswith("method.") or k in overridden}
    known = {path: knob.default for path, knob in KNOBS.items()}
    known |= {f"method.{name}": value for name, value in method_fields(method).items()}
    known["method.name"] = method

    values = {}
    for path, value in (known | asked).items():
        if path not in known:
            raise UserError(f"unknown knob config.{path}{nearest(path, known)}")
        values[path] = _coerce(path, value, known[path])
        _check(path, values[path])
    complete = FrozenConfigDict(_nest(values))
    make_ensemble(complete, num_classes=1)
    if complete.data.mixup and make_method(complete).separate_views:
        raise UserError(
            f"config.data.mixup={complete.data.mixup:g} mixes labels with images, and {method} gives every "
            f"student other images: leave it out"
        )
    return complete


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict, ready for JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(ConfigDict(config).to_dict()))
    return plain


def result_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of everything that changes what a run computes."""
    flat = _flatten(json.loads(json.dumps(config)))
    return {k: v for k, v in flat.items() if k not in KNOBS or KNOBS[k].changes_result}


def fingerprint(config: Any) -> str:
    """12 hexadecimal digits that two configurations share if they compute the same."""
    text = json.dumps(result_fields(to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: Any) -> dict[str, Any]:
    """What names a run in its summary and in the students taken out of it."""
    return {
        "model": config.model.name,
        "method": config.method.name,
        "data": config.data.name,
        "seed": config.seed,
        "fingerprint": fingerprint(config),
    }


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _coerce(path: str, value: Any, like: Any) -> Any:
    """`value` as the type of the default `like`; an integer will do for a float."""
    if path == "model.students":
        return tuple(value) if isinstance(value, list) else value
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(like, tuple):
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(path, v, like[0] if like else "") for v in values)
    if type(value) is not type(like):
        raise UserError(
            f"config.{path}={value!r} must be of type {type(like).__name__}, like its default {like!r}"
        )
    return value


def _check(path: str, value: Any) -> None:
    knob = KNOBS.get(path)
    if knob and not knob.allowed(value):
        hint = (
            nearest(value, knob.must.removeprefix("be one of ").split(", "))
            if isinstance(value, str)
            else ""
        )
        raise UserError(f"config.{path}={value!r} must {knob.must}{hint if 'did you' in hint else ''}")
