"""The records in `student.json`: everything about a student but its weights."""

import dataclasses
from typing import Any

FORMAT = 6


@dataclasses.dataclass(frozen=True)
class NetworkDescription:
    """The network of a student, complete enough to build it again.

    Attributes:
        name: name of the network, one of `list_models`.
        widths: width multiplier of every stage, as fractions ("4/5").
        num_classes: K.
        input_shape: H, W, C.
        dtype: data type of convolutions.
        options: options of the network, as `models.EnsembleSpec` has them (dropout, padding, ...).
        channels: channels of the feature maps that students are compared by; for people.
        imports: the user's modules that register the network.
    """

    name: str
    widths: tuple[str, ...]
    num_classes: int
    input_shape: tuple[int, int, int]
    dtype: str
    options: dict[str, Any]
    channels: tuple[int, ...] = ()
    imports: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an image: resizing, as `fit` says, then normalization.

    Attributes:
        mean: per channel, or one value; subtracted from pixels scaled to [0, 1].
        std: per channel, or one value; divides the result.
        fit: "native", "stretch" or "crop", as the knob `data.fit`.
        image_size: height and width; 0: as stored.
        formula: the normalization, for people.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "native"
    image_size: int = 0
    formula: str = "(image / 255 - mean) / std"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of a student: a run and its step, or a file of PyTorch weights.

    Attributes:
        data: the data set it was trained for, as the knob `data.name`.
        test_split: the TFDS split it is tested on; empty: the usual one.
        model, method, seed, fingerprint: of the run's configuration.
        method_summary: a sentence about the method.
        settings: the knobs that change the result and differ from their defaults, by name.
        train_examples: how many images it was trained on.
        steps, epochs: how long the run was to train.
        step, epoch: of the checkpoint.
        converted_from: name of the file of PyTorch weights.
        version: of this package.
    """

    data: str
    test_split: str = ""
    model: str = ""
    method: str = ""
    seed: int = 0
    fingerprint: str = ""
    method_summary: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    train_examples: int = 0
    steps: int = 0
    epochs: float = 0.0
    step: int = 0
    epoch: float = 0.0
    converted_from: str = ""
    version: str = ""


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """The scores of a student on the test images of one class, in per cent, and the number of these images."""

    images: int
    recall: float
    precision: float
    f1: float


@dataclasses.dataclass(frozen=True)
class StudentDescription:
    """Everything about a student but its weights; `student.json`.

    Attributes:
        network: how to build it again.
        student: its number in the run, from 1.
        parameters: how many it has.
        macs: multiply-accumulates for one image.
        class_names: K names; a label is the place in them.
        preprocessing: what is done to an image first.
        provenance: where it comes from.
        evaluated_on: "test" or "validation": what `metrics` were measured on.
        metrics: `{"top1": per cent, "top5": per cent, "nll": nats}`; empty if it was not evaluated.
        examples: how many images `metrics` were measured on; 0 if that is not known.
        by_class: scores on the test images of each class; empty if they were not measured.
        weights_sha256: of `weights.safetensors`, hexadecimal.
        format: version of this record.
    """

    network: NetworkDescription
    student: int
    parameters: int
    macs: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    provenance: Provenance
    evaluated_on: str = "test"
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    examples: int = 0
    by_class: dict[str, ClassScores] = dataclasses.field(default_factory=dict)
    weights_sha256: str = ""
    format: int = FORMAT
