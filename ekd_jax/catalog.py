"""Lists of what there is: knobs, networks and methods; `ekd knobs|models|methods [PATTERN]`.

The pattern is part of a name, or has wildcards (`*`). `--imports=my_package.nets` imports your modules first,
so that their networks and methods are listed, too.
"""

import fnmatch
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ekd_jax import cli
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.common.imports import import_modules
from ekd_jax.common.knob import Knob
from ekd_jax.config.knobs import KNOBS, method_knobs
from ekd_jax.methods import METHODS, list_methods
from ekd_jax.models import MODELS, build_ensemble, list_models
from ekd_jax.models.cost import count_parameters

CLASSES = 100  # for which parameters are counted
FEW = 12  # networks whose parameters are counted at once: each is traced


def run(kind: str, arguments: Sequence[str]) -> None:
    """Print a list, and exit with 2 and one line if that is not possible.

    Args:
        kind: "knobs", "models" or "methods".
        arguments: of the command line.
    """
    cli.guarded(lambda: _run(kind, arguments))


def _run(kind: str, arguments: Sequence[str]) -> None:
    if {"--help", "-h"} & set(arguments):
        print(f"ekd {kind} [PATTERN] [--imports=MODULE,...]\n\n{inspect.cleandoc(__doc__ or '')}")
        return
    patterns = [a for a in arguments if not a.startswith("-")]
    flags = [a for a in arguments if a.startswith("-")]
    for flag in flags:
        if not flag.startswith("--imports="):
            raise UserError(f"ekd {kind} has no flag {flag}; did you mean --imports=MODULE?")
        import_modules(flag.removeprefix("--imports=").split(","), "--imports")
    if len(patterns) > 1:
        raise UserError(f"ekd {kind} takes one pattern, not {len(patterns)}")
    print({"knobs": knobs, "models": models, "methods": methods}[kind](patterns[0] if patterns else ""))


def knobs(pattern: str) -> str:
    """Return the knobs whose names match, each with its default, meaning and allowed values.

    The knobs of every method are listed under their full names, such as `method.temperature (oem, kd)`.
    """
    own: dict[tuple[str, str], list[str]] = {}
    by_key: dict[tuple[str, str], Knob] = {}
    for method in list_methods():
        for name, knob in method_knobs(method).items():
            key = (name, f"{knob.default!r} {knob.meaning}")
            own.setdefault(key, []).append(method)
            by_key[key] = knob
    entries = {name: knob for name, knob in KNOBS.items()}
    entries |= {f"{name} ({', '.join(of)})": by_key[name, rest] for (name, rest), of in own.items()}
    chosen = _matching(entries, pattern, "knob", lambda name: name.split(" ")[0])
    return "\n".join(_describe_knob(name, entries[name]) for name in chosen)


def _describe_knob(name: str, knob: Knob) -> str:
    allowed = knob.rule.must.removeprefix("be ").replace("not be ", "not ")
    if knob.rule.choices:
        choices = knob.rule.choices()
        allowed = "one of " + ", ".join(c or "''" for c in choices) if len(choices) <= 12 else ""
    notes = [f"Allowed: {allowed}." if allowed else ""]
    if not knob.changes_result:
        notes.append("May change when a run is resumed.")
    text = " ".join(filter(None, [knob.meaning, *notes]))
    body = textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")
    return f"config.{name} = {knob.default!r}\n{body}"


def models(pattern: str) -> str:
    """Return the networks whose names match by family, with the parameters of each if there are few."""
    chosen = _matching(list_models(), pattern, "network")
    families: dict[str, list[str]] = {}
    for name in chosen:
        families.setdefault(_summary_of(MODELS[name].build), []).append(name)
    lines = []
    for summary, names in families.items():
        own = [f"{n} ({_parameters(n):,})" for n in names] if len(chosen) <= FEW else names
        lines += [
            summary,
            textwrap.fill(", ".join(own), 100, initial_indent="    ", subsequent_indent="    "),
        ]
    if len(chosen) <= FEW:
        lines.append(f"in brackets: parameters at width 1 for {CLASSES} classes")
    return "\n".join(lines)


def _summary_of(function: Any) -> str:
    """Return the first paragraph of the documentation of the file that defines a function."""
    while isinstance(function, functools.partial):
        function = function.func
    module = inspect.getmodule(function)
    doc = inspect.cleandoc(module.__doc__ or module.__name__) if module else "?"
    return " ".join(doc.split("\n\n")[0].split())


def _parameters(name: str) -> int:
    trace = build_ensemble(name, 1, CLASSES).trace((32, 32, 3))
    return count_parameters(trace.init(None)["params"])


def methods(pattern: str) -> str:
    """Return the methods whose names match, with the summary of the class and the references of its file."""
    rows = []
    for name in _matching(list_methods(), pattern, "method"):
        module = inspect.getmodule(METHODS[name])
        parts = inspect.cleandoc(module.__doc__ or "").split("\n\n") if module else []
        references = [part for part in parts if part.startswith("References:")]
        lines = [METHODS[name].summary(), *(" ".join(text.split()) for text in references)]
        wrapped = [textwrap.wrap(s, 100, initial_indent="    ", subsequent_indent="    ") for s in lines]
        rows.append("\n".join([name, *itertools.chain(*wrapped)]))
    return "\n".join(rows)


def _matching(names: Iterable[str], pattern: str, what: str, key: Callable[[str], str] = str) -> list[str]:
    names = list(names)
    wildcard = pattern if "*" in pattern else f"*{pattern}*"
    chosen = [name for name in names if fnmatch.fnmatch(key(name), wildcard)]
    if not chosen:
        last_parts = [key(name).rpartition(".")[2] for name in names]
        raise UserError(f"no {what} matches {pattern!r}{nearest(pattern.strip('*'), last_parts)}")
    return chosen
