"""TODO: config.knobs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from ekd_jax.methods import METHODS
from ekd_jax.models import MODELS
from ekd_jax.models.ensemble import SHARINGS
from ekd_jax.models.execution import WAYS


@dataclasses.dataclass(frozen=True)
class Knob:
    """A setting: default, meaning, which values are allowed, and whether it changes the result."""

    default: Any
    meaning: str
    allowed: Callable[[Any], bool] = lambda value: True
    must: str = ""  # what `allowed` demands, in words
    changes_result: bool = True


def _one_of(choices: Iterable[str]) -> dict[str, Any]:
    names = tuple(choices)
    return {"allowed": lambda v: v in names, "must": f"be one of {', '.join(names)}"}


_POSITIVE: dict[str, Any] = {"allowed": lambda v: v > 0, "must": "be above 0"}
_NOT_NEGATIVE: dict[str, Any] = {"allowed": lambda v: v >= 0, "must": "not be negative"}
_FRACTION: dict[str, Any] = {"allowed": lambda v: 0 <= v < 1, "must": "be at least 0 and below 1"}
_BELOW_ONE: dict[str, Any] = {"allowed": lambda v: v < 1, "must": "be below 1"}
_ALL_POSITIVE: dict[str, Any] = {"allowed": lambda v: all(s > 0 for s in v), "must": "be above 0"}
_INCREASING: dict[str, Any] = {
    "allowed": lambda v: all(a < b for a, b in zip((0.0, *v), (*v, 1.0), strict=True)),
    "must": "be increasing fractions between 0 and 1",
}

_MAGNITUDE: dict[str, Any] = {"allowed": lambda v: 0 <= v <= 30, "must": "be from 0 to 30"}

_POSITIVE_STEP = {**_POSITIVE, "changes_result": False}
_PLACE: dict[str, Any] = {"changes_result": False}

KNOBS: dict[str, Knob] = {
    "seed": Knob(0, "initial values, order of examples, augmentation", **_NOT_NEGATIVE),
    "model.name": Knob("resnet20", "network", **_one_of(MODELS)),
    "model.students": Knob(
        5, "number of students, or a tuple of their width multipliers or networks ('vgg8', 'vgg8:0.5')"
    ),
    "model.sharing": Knob(
        "",
        "students have a base block in common; or part one by one, like a tree; or share nothing; empty: "
        "as the method has it",
        **_one_of(("", *SHARINGS)),
    ),
    "model.no_blocks": Knob(
        0, "how many stages of a branch are compressed, from the last; 0: all", **_NOT_NEGATIVE
    ),
    "model.shared_stages": Knob(-1, "how many stages the base block has; -1: as the method has it"),
    "model.last_map": Knob(
        "",
        "of the maps that students are compared by the last: of the last stage, or the one that is pooled "
        "for the classifier; empty: as in the official code",
        **_one_of(("", "stage", "pooled")),
    ),
    "model.dropout": Knob(-1.0, "rate before the classifier; -1: the network's own", **_BELOW_ONE),
    "model.stochastic_depth": Knob(
        -1.0, "rate at which residual blocks are left out; -1: the network's own", **_BELOW_ONE
    ),
    "model.padding": Knob(
        "",
        "of efficientnet_*: even, as torchvision's, or same, as TensorFlow's; empty: the official code's",
        **_one_of(("", "even", "same")),
    ),
    "model.initial_weights": Knob(
        "", "folder of a student that base block and student 1 begin with; its classifier if classes agree"
    ),
    "model.batch_norm": Knob(
        "global", "statistics of the whole batch, or of each device's part", **_one_of(("global", "local"))
    ),
    "model.batch_norm_epsilon": Knob(1e-5, "added to the variance", **_POSITIVE),
    "method.name": Knob(
        "oem", "how students learn; the fields of its class are its knobs", **_one_of(METHODS)
    ),
    "data.name": Knob(
        "cifar100", "digits, folder, cifar10, cifar100, svhn_cropped, imagenet2012, or any classes of TFDS"
    ),
    "data.data_dir": Knob(
        "",
        "where TFDS keeps prepared sets (empty: its own default); for folder, the folder itself",
        **_PLACE,
    ),
    "data.manual_dir": Knob("", "folder of archives to prepare from, instead of a download", **_PLACE),
    "data.extra": Knob(False, "svhn_cropped: train on its 531,131 extra images, too"),
    "data.test_split": Knob(
        "", "TFDS split to measure on; empty: test, or validation where test has no labels"
    ),
    "data.validation_examples": Knob(
        0, "training images held out, to choose by instead of by the test set", **_NOT_NEGATIVE
    ),
    "data.train_examples": Knob(0, "train on the first so many examples; 0: all", **_NOT_NEGATIVE),
    "data.corrupt": Knob(
        "fatal", "an image that cannot be read ends the run, or is left out", **_one_of(("fatal", "skip"))
    ),
    "data.fit": Knob(
        "native",
        "how images come to one size: as they are; stretched; or cropped (for training a random part, "
        "resized; for evaluation the middle of the image resized to 256/224 of the size)",
        **_one_of(("native", "stretch", "crop")),
    ),
    "data.image_size": Knob(0, "height and width of the network's input; 0: as stored", **_NOT_NEGATIVE),
    "data.crop_padding": Knob(4, "pixels added around an image before the random crop", **_NOT_NEGATIVE),
    "data.padding_mode": Knob("zero", "what they hold", **_one_of(("zero", "reflect"))),
    "data.rotation": Knob(0.0, "degrees to either side, at most, before that crop", **_NOT_NEGATIVE),
    "data.flip": Knob(True, "flip half of the training images left to right"),
    "data.policy": Knob(
        "none", "further changes of shape and color", **_one_of(("none", "randaugment", "trivialaugment"))
    ),
    "data.policy_operations": Knob(2, "randaugment: how many an image", **_POSITIVE),
    "data.policy_magnitude": Knob(9, "randaugment: how strong, of 0 to 30", **_MAGNITUDE),
    "data.mean": Knob((0.0,), "subtracted from images scaled to [0, 1]; one value, or one a channel"),
    "data.std": Knob((1.0,), "divides them then", **_ALL_POSITIVE),
    "data.cutout": Knob(0, "side of the square that is set to the mean; 0: none", **_NOT_NEGATIVE),
    "data.mixup": Knob(0.0, "alpha of mixup; 0: none", **_NOT_NEGATIVE),
    "data.label_smoothing": Knob(0.0, "share of every label given to all classes alike", **_FRACTION),
    "data.placement": Knob(
        "auto",
        "training and test images on the devices, whole or cut over them, or streamed from disk; "
        "auto: the first that fits",
        **_one_of(("auto", "replicated", "sharded", "stream")),
        changes_result=False,
    ),
    "data.device_share": Knob(
        0.2, "share of a device's memory that images may take with placement=auto", **_POSITIVE_STEP
    ),
    "data.workers": Knob(-1, "processes that decode; 0: threads alone; -1: as many as pay", **_PLACE),
    "data.threads": Knob(0, "threads in each of them; 0: as many as pay", **_NOT_NEGATIVE, **_PLACE),
    "optimizer.name": Knob(
        "sgd", "adam or rmsprop; with L2 decay as in PyTorch", **_one_of(("sgd", "adam", "rmsprop"))
    ),
    "optimizer.learning_rate": Knob(0.1, "to begin with", **_POSITIVE),
    "optimizer.reference_batch_size": Knob(
        0,
        "the batch size that the rate is for: it is scaled by train.batch_size over this (Goyal et al. "
        "2017); 0: as it is",
        **_NOT_NEGATIVE,
    ),
    "optimizer.warmup_epochs": Knob(
        -1.0,
        "over which the rate rises to its value, from what it is without scaling or from 0; -1: 5 if it is "
        "scaled up, or else 0",
        lambda v: v == -1 or v >= 0,
        "be -1, or not negative",
    ),
    "optimizer.momentum": Knob(0.9, "of sgd and rmsprop", **_FRACTION),
    "optimizer.nesterov": Knob(True, "Nesterov's momentum for sgd"),
    "optimizer.weight_decay": Knob(1e-4, "L2, added to the gradient of every parameter", **_NOT_NEGATIVE),
    "optimizer.schedule": Knob(
        "steps", "the rate drops at milestones, or goes down a cosine", **_one_of(("steps", "cosine"))
    ),
    "optimizer.milestones": Knob((0.5, 0.75), "fractions of training where the rate drops", **_INCREASING),
    "optimizer.decay": Knob(0.1, "factor by which it drops", **_POSITIVE),
    "optimizer.decay_every_epochs": Knob(
        0.0, "the rate also drops every so many epochs; 0: at the milestones alone", **_NOT_NEGATIVE
    ),
    "train.epochs": Knob(300.0, "passes over the training set", **_POSITIVE),
    "train.batch_size": Knob(128, "examples a step, over all devices", **_POSITIVE),
    "train.accumulate": Knob(
        1,
        "parts of a batch that go through the networks one after the other; see docs/scale.md",
        **_POSITIVE,
    ),
    "train.rematerialize": Knob(
        False,
        "the backward pass keeps what goes into blocks alone, and computes the rest again",
        changes_result=False,
    ),
    "train.execution": Knob(
        "auto",
        "the students' branches run one by one; equal ones stacked; or packed into one wide network; auto: "
        "one by one on CPU, elsewhere as a measurement finds fastest",
        **_one_of(("auto", *WAYS)),
        changes_result=False,
    ),
    "train.fsdp": Knob(
        1, "devices that share one copy of parameters, optimizer state and averages", **_POSITIVE_STEP
    ),
    "train.dtype": Knob("float32", "what convolutions compute in", **_one_of(("float32", "bfloat16"))),
    "train.log_every_steps": Knob(100, "steps that one training record averages", **_POSITIVE_STEP),
    "train.evaluate_every_epochs": Knob(5.0, "epochs between evaluations", **_POSITIVE_STEP),
    "train.checkpoint_every_epochs": Knob(1.0, "epochs between checkpoints", **_POSITIVE_STEP),
    "evaluate.batch_size": Knob(500, "examples a step of evaluation, over all devices", **_POSITIVE_STEP),
}


def method_fields(name: str) -> dict[str, Any]:
    """The knobs of a method with their defaults: the fields of its class."""
    own = dataclasses.fields(METHODS[name])
    return {f.name: f.default for f in own if f.name not in ("parent", "name")}


def default(method: str = "oem") -> ConfigDict:
    """All knobs at their defaults, with those of `method`."""
    values = {path: knob.default for path, knob in KNOBS.items()}
    # A number or a tuple: the command line takes any literal here, `resolve` checks it.
    values["model.students"] = FieldReference(values["model.students"], field_type=object)
    values |= {f"method.{name}": value for name, value in method_fields(method).items()}
    values["method.name"] = method
    return ConfigDict(_nest(values))


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        section, _, name = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested
