"""The records in a run's directory: `students.json`, while it trains, and `summary.json`, when it is complete."""

import dataclasses
from collections.abc import Mapping

A_RUN = "the directory of a run"
CONFIG, STUDENTS, ENVIRONMENT = "config.json", "students.json", "environment.json"
SUMMARY, HISTORY, BENCHMARK, TRACKER = "summary.json", "history.json", "benchmark.json", "tracker.json"


@dataclasses.dataclass(frozen=True)
class StudentInfo:
    """Description of a student before training.

    Attributes:
        student: its number, from 1.
        network: name of its network.
        width: its width multiplier, or one per stage, as text.
        channels: of the feature maps that students are compared by.
        parameters: how many, the base block included.
        macs: multiply-accumulates of convolutions and matrix products for one image.
        activations: outputs of these for one image (Dollar et al. 2021, "Fast and accurate model scaling").
        ratio: parameters, relative to student 1.
    """

    student: int
    network: str
    width: str
    channels: tuple[int, ...]
    parameters: int
    macs: int
    activations: int
    ratio: float


@dataclasses.dataclass(frozen=True)
class TeacherInfo:
    """A frozen teacher of a run: where it is from, and the SHA-256 of its weights."""

    source: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class DataDescription:
    """The examples that a run reads: a run resumes on the same ones only.

    Attributes:
        name: name of the data set.
        train_examples: number of examples to train on.
        validation_examples: number of examples held out for validation.
        test_examples: number of examples to test on.
        fingerprint: 64 hexadecimal digits that differ if any example or its class differs.
    """

    name: str
    train_examples: int
    validation_examples: int
    test_examples: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class RunDescription:
    """Description of the students and the data of a run; `students.json`.

    Attributes:
        model: network of the students that do not name another.
        num_classes: K.
        input_shape: H, W, C.
        base_parameters: parameters that all students share; counted in each of them.
        method_parameters: parameters that the method trains besides (adaptation layers, ...); None if that
            depends on teachers that are not there yet.
        students: one entry each.
        class_names: K names; a label is the place in them.
        data: the examples; None before the data is opened.
        teachers: the frozen teachers.
    """

    model: str
    num_classes: int
    input_shape: tuple[int, int, int]
    base_parameters: int
    method_parameters: int | None
    students: tuple[StudentInfo, ...]
    class_names: tuple[str, ...] = ()
    data: DataDescription | None = None
    teachers: tuple[TeacherInfo, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """Top-1 accuracies of one predictor, in per cent.

    Attributes:
        top1_last: on the test set, after the last epoch: the result.
        top1_best: at the best evaluation, on the set that was watched.
        best_step: the step of that evaluation.
    """

    top1_last: float
    top1_best: float
    best_step: int


@dataclasses.dataclass(frozen=True)
class StudentResult(StudentInfo):
    """A student and its `Result`."""

    top1_last: float
    top1_best: float
    best_step: int


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """Why a run ended before its last epoch: the ensemble's validation top-1 had not risen for too long.

    Attributes:
        step: the run's last step.
        planned_steps: the number of steps without early stopping.
        best_step: step of the best evaluation.
        patience_epochs: `train.patience_epochs`.
    """

    step: int
    planned_steps: int
    best_step: int
    patience_epochs: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The outcome of a complete run; `summary.json`.

    Attributes:
        model, method, data, seed, fingerprint: what the configuration asked for.
        steps, epochs: how long it was trained.
        seconds: wall-clock by what was done ("read", "compile", "train", "evaluate").
        best_on: "test" or "validation": the set that was watched while training.
        method_parameters: as in `RunDescription`.
        students: one entry each.
        ensemble: of the ensemble teacher.
        others: of what else predicts, by name.
        stopped: why it was trained for fewer steps than asked for; None if it was not.
    """

    model: str
    method: str
    data: str
    seed: int
    fingerprint: str
    steps: int
    epochs: float
    seconds: dict[str, float]
    best_on: str
    method_parameters: int | None
    students: tuple[StudentResult, ...]
    ensemble: Result
    others: Mapping[str, Result] = dataclasses.field(default_factory=dict)
    stopped: EarlyStop | None = None
