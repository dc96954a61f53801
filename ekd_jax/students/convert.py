"""PyTorch weights as students: which library they are from, and which network they fit."""

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from ekd_jax import models
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.models.blocks import Chain, Stage
from ekd_jax.models.cost import count_parameters
from ekd_jax.models.ensemble import Ensemble, EnsembleTrace, Variables
from ekd_jax.students.description import NetworkDescription
from ekd_jax.students.torch_arrays import Arrays, Match, match_arrays, shown
from ekd_jax.students.torch_names import LAYERS, Source, head_weight, sources, todays_names, torch_name

NEARLY = 0.05  # up to this share of problems an error looks for no other network
ALIKE = 0.5  # share of the arrays that must fit another network for an error to mention it


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network with the values of a state dict.

    Attributes:
        variables: as `LoadedStudent` has them.
        network: how to build it again.
        parameters: number of its parameters.
        macs: multiply-accumulates for one image.
        library: whose names the arrays have.
        auxiliary: names of arrays of auxiliary heads, which were left out.
    """

    variables: Variables
    network: NetworkDescription
    parameters: int
    macs: int
    library: str
    auxiliary: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """A network that weights are to be converted to, or its students.

    Attributes:
        model: a key of `models.MODELS`.
        input_shape: H, W, C.
        options: fields of `models.EnsembleSpec`, which override what the library's network needs.
        students: width multipliers of the students, or their number, as `models.build_ensemble` takes them.
        two_classes: whether a network with one output becomes one with two classes, 0 and that output.
    """

    model: str
    input_shape: tuple[int, int, int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    students: Any = (1,)
    two_classes: bool = False


def convert(request: Request, state: Arrays) -> Converted:
    """Return a network with the values of a state dict. Arguments and errors are those of `convert_students`."""
    return convert_students(request, [state])[0]


def convert_students(request: Request, states: Sequence[Arrays]) -> list[Converted]:
    """Return students with the values of state dicts.

    If several libraries have the network, the one whose names fit best is taken. The number of classes is
    that of the classifier. Of several students, as many stages are compressed as fits.

    Args:
        request: the network and its students.
        states: for each student the `state_dict()` of its whole network.

    Raises:
        UserError: no library has the network, it has one output, or arrays are missing, left over, of another
            shape, not floats or not finite.
    """
    known = sources(request.model)
    if not known:
        names = [name for name in models.MODELS if sources(name)]
        raise UserError(
            f"--model={request.model}: there are no rules to convert its weights "
            f"(ekd_jax/students/torch_names.py){nearest(request.model, names)}"
        )
    known = [source for source in known if _begins_alike(source, states[0])] or known[:1]
    family = models.MODELS[request.model]
    compressed = range(family.stages - family.shared, 0, -1) if request.students != (1,) else [0]
    best = _best(_attempt(request, source, states, compressed[0]) for source in known)
    if best.problems and len(compressed) > 1:
        fewer = (_attempt(request, best.source, states, stages) for stages in compressed[1:])
        best = _best(itertools.chain([best], fewer))
    if best.problems:
        raise _misfit(request, states, best)
    return best.converted(request)


def _best(attempts: Iterator["_Attempt"]) -> "_Attempt":
    """Return the first attempt without problems, or that with the fewest."""
    best = next(attempts)
    while best.problems and (other := next(attempts, None)):
        best = min(best, other, key=lambda attempt: attempt.problems)
    return best


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """Students with the values that the names of one library give them.

    Attributes:
        source: the library and its rules.
        options: fields of `models.EnsembleSpec`.
        classes: number of classes K.
        ensemble: the networks.
        trace: of `ensemble`.
        matches: the values of each student.
    """

    source: Source
    options: Mapping[str, Any]
    classes: int
    ensemble: Ensemble
    trace: EnsembleTrace
    matches: list[Match]

    @property
    def problems(self) -> int:
        """Number of names that do not fit."""
        return sum(match.problems for match in self.matches)

    def converted(self, request: Request) -> list[Converted]:
        """Return the students."""
        return [
            Converted(
                variables=match.variables,
                network=NetworkDescription(
                    name=request.model,
                    widths=tuple(map(str, widths)),
                    num_classes=self.classes,
                    input_shape=request.input_shape,
                    dtype="float32",
                    options=dict(self.options),
                ),
                parameters=count_parameters(match.variables["params"]),
                macs=self.trace.cost(number).macs,
                library=self.source.library,
                auxiliary=tuple(match.auxiliary),
            )
            for number, (match, widths) in enumerate(
                zip(self.matches, self.ensemble.widths, strict=True), 1
            )
        ]


def _attempt(request: Request, source: Source, states: Sequence[Arrays], compressed: int) -> _Attempt:
    """Match state dicts by the names of one library, with that number of stages compressed."""
    states = [_prepared(state, source, request.two_classes) for state in states]
    classes = _classes(states[0], source)
    options = {**source.options, **request.options}
    ensemble = models.build_ensemble(
        request.model, request.students, classes, sharing="none", compressed_stages=compressed, **options
    )
    trace = ensemble.trace(request.input_shape)
    shapes = trace.init(None)
    matches = [
        match_arrays(ensemble.student_variables(shapes, number), state, source.rules)
        for number, state in enumerate(states, 1)
    ]
    return _Attempt(source, options, classes, ensemble, trace, matches)


def _begins_alike(source: Source, state: Arrays) -> bool:
    """Return whether a layer of the first block has the library's name."""
    names = _prepared(state, source, two_classes=True)
    firsts = itertools.product(("stage1", "stage1.0", "stage1.mb1.0"), LAYERS)
    return any(torch_name(f"{block}.{layer}.kernel", source.rules) in names for block, layer in firsts)


def _unprefixed(state: Arrays, source: Source) -> Arrays:
    """Return a state dict without a prefix that all names have in common, but none of the library's."""
    while len(prefixes := {name.partition(".")[0] for name in state if "." in name}) == 1:
        (prefix,) = prefixes
        if torch_name("stem.conv.kernel", source.rules).startswith(f"{prefix}."):
            break
        state = {name.removeprefix(f"{prefix}."): value for name, value in state.items()}
    return state


def _prepared(state: Arrays, source: Source, two_classes: bool) -> Arrays:
    """Return a state dict with today's names, and two classes in place of one output if they are asked for."""
    state = _unprefixed(state, source)
    names = todays_names(source, {name: np.shape(value) for name, value in state.items()})
    renamed = {names[name]: value for name, value in state.items()}
    head = head_weight(source.rules)
    if head in renamed and _classes(renamed, source) == 1:
        if not two_classes:
            raise UserError(
                "the network has one output, whose sigmoid is a probability, and a student has at least two: name "
                "two classes, with --class_names, the second being the one that the output stands for"
            )
        for name in (head, head.removesuffix("weight") + "bias"):
            if name in renamed:
                value = np.asarray(renamed[name])
                value = value.T if value.shape[-1:] == (1,) and value.shape[0] > 1 else value  # (in, out)
                renamed[name] = np.concatenate([np.zeros_like(value), value])
    return renamed


def _classes(state: Arrays, source: Source) -> int:
    """Return the number of outputs of the classifier; 1 if there is none."""
    head = head_weight(source.rules)
    found = state.get(head.removesuffix("weight") + "bias", state.get(head))
    return 1 if found is None else np.shape(found)[0]


# --- errors --------------------------------------------------------------------------------------


def _misfit(request: Request, states: Sequence[Arrays], attempt: _Attempt) -> UserError:
    """Return an error that shows what does not fit, what the file has, and which network it looks like."""
    number, match = next((n, match) for n, match in enumerate(attempt.matches, 1) if match.problems)
    student = f" student {number} of" if len(states) > 1 else ""
    named = match.missing or match.left
    found = (
        f"; there are {len(states[number - 1])} arrays: {shown(list(states[number - 1]))}" if named else ""
    )
    first = attempt.matches[0]
    if len(states) > 1 and match.misshapen:
        widths = ", ".join(str(own[-1]) for own in attempt.ensemble.widths)
        found += f"; {len(states)} students have the widths {widths}: is a file missing?"
    elif first.problems > NEARLY * len(states[0]):
        found += _looks_like(request, states[0], first)
    return UserError(f"the weights do not fit{student} {request.model}: {match}{found}")


def _looks_like(request: Request, state: Arrays, match: Match) -> str:
    """Return a hint which other network the arrays of a first student fit, or fit better, or ""."""
    near, own = difflib.SequenceMatcher(b=request.model), sources(request.model)

    def distance(name: str) -> tuple[bool, float]:
        near.set_seq1(name)
        return not any(source in own for source in sources(name)), -near.ratio()

    best, best_problems = "", match.problems
    for name in sorted(models.MODELS, key=distance):
        for source in sources(name) if name != request.model else ():
            prepared = _prepared(state, source, two_classes=True)
            ensemble = models.build_ensemble(name, 1, _classes(prepared, source), sharing="none")
            if not _is_as_deep(ensemble, source, prepared):
                continue
            shapes = ensemble.student_variables(ensemble.trace((64, 64, 3)).init(None), 1)
            other = match_arrays(shapes, prepared, source.rules)
            if not other.problems:
                return f"; they are those of {name}: use --model={name}"
            if other.problems < best_problems and other.matched > ALIKE * len(state):
                best, best_problems = name, other.problems
    return f"; they look more like {best}" if best else ""


def _is_as_deep(ensemble: Ensemble, source: Source, state: Arrays) -> bool:
    """Return whether a state dict has the last block of every stage, or more. It takes no time."""

    def has_last_block(path: str, module: nn.Module) -> bool:
        if isinstance(module, Chain):
            return all(has_last_block(f"{path}.{name}", part()) for name, part in module.parts)
        block = f"{path}.{module.blocks - 1}" if isinstance(module, Stage) else path
        return any(torch_name(f"{block}.{layer}.kernel", source.rules) in state for layer in LAYERS)

    (_, *stages) = ensemble.networks[0].stages  # the first is the stem
    return all(has_last_block(name, part()) for name, part in stages)
