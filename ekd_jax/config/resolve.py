"""From what a user asks for to the complete, checked configuration that a run stores and obeys."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common.errors import UserError
from ekd_jax.common.imports import import_modules
from ekd_jax.common.knob import shown
from ekd_jax.common.records import read_json
from ekd_jax.config.build import build_networks
from ekd_jax.config.knobs import KNOBS, all_knobs, default_config, nest
from ekd_jax.config.other_names import hint
from ekd_jax.models.members import parse_students


def resolve(config: Mapping[str, Any], overridden: Iterable[str] = ()) -> FrozenConfigDict:
    """Return the complete, checked configuration.

    The user's modules that it names (`imports`) are imported first, so that their networks, methods and data
    sets can be looked up.

    Args:
        config: a recipe's configuration, with the changes of the command line.
        overridden: dotted names that the command line set. If `method.name` is among them, the recipe's
            other method knobs belong to another method and give way to the defaults.

    Raises:
        UserError: an unknown knob, a value of the wrong type or out of range, a module that cannot be
            imported.
    """
    asked = flatten(config)
    overridden = set(overridden)
    modules, method = (
        _coerce(path, asked.get(path, KNOBS[path].default), KNOBS[path].default)
        for path in ("imports", "method.name")
    )
    import_modules(modules)
    KNOBS["method.name"].check("config.method.name", method)
    if "method.name" in overridden:
        asked = {k: v for k, v in asked.items() if not k.startswith("method.") or k in overridden}
    known = all_knobs(method)

    values = {path: knob.default for path, knob in known.items()} | {"method.name": method}
    for path, value in (values | asked).items():
        if path not in known:
            raise UserError(f"unknown knob config.{path}{hint(path, known)}")
        values[path] = _coerce(path, value, known[path].default)
        known[path].check(f"config.{path}", values[path])
    complete = FrozenConfigDict(nest(values))
    method_of = build_networks(complete, num_classes=1, input_shape=(1, 1, 1)).method
    if complete.data.mixup and method_of.separate_views:
        raise UserError(
            f"config.data.mixup={complete.data.mixup:g} mixes labels with images, and {method} gives every "
            f"student other images: leave it out"
        )
    if complete.train.patience_epochs and not complete.data.validation_examples:
        raise UserError(
            f"train.patience_epochs={complete.train.patience_epochs:g} needs images that are neither trained "
            f"nor tested on: hold some out, as in --config.data.validation_examples=1000"
        )
    if complete.train.patience_epochs and not method_of.trains_networks:
        raise UserError(
            f"train.patience_epochs={complete.train.patience_epochs:g}: {method} does not train the networks, "
            f"whose accuracy stays as it is: leave it out"
        )
    return complete


def read_config(path: pathlib.Path, what: str) -> FrozenConfigDict:
    """Read the configuration of a run from its `config.json`.

    Args:
        path: of the file.
        what: the directory of the file ought to be, for the error.

    Raises:
        UserError: there is none, it is damaged, or it needs a module that is missing.
    """
    stored = read_json(path, what)
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged: it does not hold a configuration")
    try:
        return resolve(stored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def to_dict(config: FrozenConfigDict) -> dict[str, Any]:
    """Return a configuration as nested dicts, ready for JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(ConfigDict(config).to_dict()))
    return plain


def result_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted name -> value of every knob that changes what a run computes."""
    flat = flatten(json.loads(json.dumps(config)))
    # With early stopping, evaluations decide when a run ends.
    stops = {"train.evaluate_every_epochs"} if flat.get("train.patience_epochs") else set()
    return {k: v for k, v in flat.items() if k not in KNOBS or KNOBS[k].changes_result or k in stops}


def fingerprint(config: FrozenConfigDict) -> str:
    """Return 12 hexadecimal digits that two configurations share if they compute the same."""
    text = json.dumps(result_fields(to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: FrozenConfigDict) -> dict[str, Any]:
    """Return what names a run in its summary and in the students extracted from it."""
    return {
        "model": config.model.name,
        "method": config.method.name,
        "data": config.data.name,
        "seed": config.seed,
        "fingerprint": fingerprint(config),
    }


def settings(config: FrozenConfigDict) -> dict[str, Any]:
    """Return dotted name -> value of every knob that changes the result and differs from the method's defaults."""
    usual = result_fields(to_dict(resolve(default_config(config.method.name))))
    own = result_fields(to_dict(config))
    return {name: value for name, value in own.items() if name not in usual or usual[name] != value}


def steps_in(epochs: float, config: FrozenConfigDict, examples: int) -> int:
    """Return the number of steps nearest to a number of epochs over so many examples; at least one."""
    return max(1, round(epochs * examples / config.train.batch_size))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"section.name": value}` of `{"section": {"name": value}}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _coerce(path: str, value: Any, like: Any) -> Any:
    """Return `value` as the type of the default `like`; an integer will do for a float."""
    if path == "model.students":  # a number, or a tuple of numbers, texts and tuples
        value = _as_tuples(value)
        parse_students(value)
        return value
    if path == "seeds" and isinstance(value, list | tuple):
        return tuple(_coerce("seeds", seed, 0) for seed in value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(like, tuple):
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(path, v, like[0] if like else "") for v in values)
    if type(value) is not type(like):
        raise UserError(
            f"config.{path}={shown(value)} must be of type {type(like).__name__}, like its default {like!r}"
        )
    return value
