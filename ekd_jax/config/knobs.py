"""All knobs: the settings of a configuration, each with its default, meaning and allowed values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from ekd_jax.common.knob import (
    ALL_POSITIVE,
    FRACTION,
    INCREASING_FRACTIONS,
    NOT_NEGATIVE,
    POSITIVE,
    Knob,
    Rule,
    between,
    one_of,
)
from ekd_jax.methods import METHODS
from ekd_jax.methods.base import knobs_of
from ekd_jax.models import MODELS
from ekd_jax.models.ensemble import SHARINGS
from ekd_jax.models.execution import EXECUTIONS


def _are_class_weights(texts: Sequence[str]) -> bool:
    """Return whether these are "balanced" or texts "class=weight", with weights that are not negative."""

    def is_weight(text: str) -> bool:
        _, equals, number = text.rpartition("=")
        try:
            return bool(equals) and 0 <= float(number) < math.inf
        except ValueError:
            return False

    return tuple(texts) == ("balanced",) or all(map(is_weight, texts))


def _are_seeds(values: Sequence[int]) -> bool:
    return len(set(values)) == len(values) and all(value >= 0 for value in values)


TRACKERS = ("wandb", "trackio")
EPOCHS = Rule(lambda value: 0 < value <= 1e6, "be above 0 and at most 1,000,000")
SHRINKS = Rule(lambda value: 0 < value <= 1, "be above 0 and at most 1")
RATE = Rule(lambda value: value == -1 or 0 <= value < 1, "be -1, or at least 0 and below 1")

KNOBS: dict[str, Knob] = {
    "seed": Knob(0, "Random seed of initial values, order of examples and augmentation.", NOT_NEGATIVE),
    "seeds": Knob(
        (),
        "Several seeds, such as (0, 1, 2), whose runs are trained one after the other, each in a directory of its "
        "own; more may be added later. Empty: only `seed` (docs/training.md).",
        Rule(_are_seeds, "be different whole numbers, none negative"),
        changes_result=False,
    ),
    "imports": Knob(
        (),
        "Modules of yours to import before anything is looked up; they register networks, methods and data "
        "sets (docs/extending.md).",
        changes_result=False,
    ),
    "model.name": Knob("resnet20", "Network; `ekd models` lists them.", one_of(MODELS)),
    "model.students": Knob(
        5,
        "Number S of students, whose widths are then 1, (S-1)/S, ..., 1/S; or a tuple with the width or the "
        "network of each, such as (1, 0.5) or ('vgg8', 'vgg8:0.5').",
    ),
    "model.sharing": Knob(
        "",
        "Which parts students share: one base block; a tree, whose paths part one by one; or none. Empty: "
        "the method's default.",
        one_of(("", *SHARINGS)),
    ),
    "model.compressed_stages": Knob(
        0, "Number of stages of a branch that are compressed, counted from the last; 0: all.", NOT_NEGATIVE
    ),
    "model.shared_stages": Knob(
        -1, "Number of stages in the base block; -1: the method's default.", between(-1, 100)
    ),
    "model.last_map": Knob(
        "",
        "Which feature map is matched last: the last stage's output, or the map pooled for the classifier. "
        "Empty: as in the official code.",
        one_of(("", "stage", "pooled")),
    ),
    "model.dropout": Knob(-1.0, "Dropout rate before the classifier; -1: the network's own.", RATE),
    "model.stochastic_depth": Knob(
        -1.0, "Rate at which residual blocks are dropped; -1: the network's own.", RATE
    ),
    "model.padding": Knob(
        "",
        "Padding of efficientnet_* convolutions: even, as in torchvision, or same, as in TensorFlow. Empty: "
        "as in the official code.",
        one_of(("", "even", "same")),
    ),
    "model.initial_weights": Knob(
        "",
        "Student directory whose weights the base block and student 1 start from; the classifier is taken "
        "over if the classes agree.",
    ),
    "model.frozen_stages": Knob(
        -1,
        "The stem and so many stages keep their weights and statistics, for fine-tuning; 0: the stem alone; -1: "
        "everything learns (docs/training.md).",
        Rule(lambda v: v >= -1, "be -1, or not negative"),
    ),
    "model.batch_norm": Knob(
        "global",
        "Batch norm statistics: of the whole batch, or of each device's part of it.",
        one_of(("global", "local")),
    ),
    "model.batch_norm_epsilon": Knob(1e-5, "Added to the variance in batch norm.", POSITIVE),
    "method.name": Knob("oem", "Training method; `ekd methods` lists them.", one_of(METHODS)),
    "data.name": Knob(
        "cifar100",
        "Data set: digits, folder, cifar10, cifar100, svhn_cropped, imagenet2012, one that a module of `imports` "
        "registers, or any image classification set of TFDS.",
    ),
    "data.data_dir": Knob(
        "",
        "Directory of prepared TFDS sets (empty: the default of TFDS); for data.name=folder, the directory "
        "of class folders itself.",
        changes_result=False,
    ),
    "data.manual_dir": Knob(
        "", "Directory of archives to prepare a set from, instead of a download.", changes_result=False
    ),
    "data.extra": Knob(False, "svhn_cropped: also train on the 531,131 extra images."),
    "data.test_split": Knob(
        "",
        "Split to test on: of a TFDS set, or a directory such as val of data.name=folder. Empty: test, or "
        "validation where there is no test or it has no labels.",
    ),
    "data.validation_examples": Knob(
        0,
        "Number of training images held out for validation, to choose by instead of the test set.",
        NOT_NEGATIVE,
    ),
    "data.train_examples": Knob(0, "Train on the first N training examples only; 0: all.", NOT_NEGATIVE),
    "data.sampler": Knob(
        "shuffled",
        "Order of the training images: each once per epoch (shuffled), or as many drawn with replacement, every "
        "class equally likely (balanced).",
        one_of(("shuffled", "balanced")),
    ),
    "data.corrupt": Knob(
        "fatal",
        "An image that cannot be decoded ends the run (fatal), or is left out (skip).",
        one_of(("fatal", "skip")),
    ),
    "data.max_pixels": Knob(
        178_956_970,
        "Largest image file that is decoded, in pixels: a small file may claim any size.",
        POSITIVE,
        changes_result=False,
    ),
    "data.fit": Knob(
        "native",
        "How images are brought to the input size: native, they have it; stretch; or crop (for training a "
        "random part, resized; for evaluation the center of the image resized to 256/224 of the size).",
        one_of(("native", "stretch", "crop")),
    ),
    "data.image_size": Knob(
        0, "Height and width of the network's input, in pixels; 0: as stored.", between(0, 4096)
    ),
    "data.crop_padding": Knob(
        4, "Pixels added on each side of an image before the random crop.", between(0, 4096)
    ),
    "data.padding_mode": Knob("zero", "Values of the added pixels.", one_of(("zero", "reflect"))),
    "data.rotation": Knob(
        0.0, "Largest angle of the random rotation before the crop, in degrees.", NOT_NEGATIVE
    ),
    "data.flip": Knob(True, "Flip half of the training images left to right."),
    "data.policy": Knob(
        "none",
        "Augmentation policy on top of crop and flip.",
        one_of(("none", "randaugment", "trivialaugment")),
    ),
    "data.policy_operations": Knob(2, "randaugment: number of operations per image.", between(1, 100)),
    "data.policy_magnitude": Knob(9, "randaugment: strength of each operation, 0 to 30.", between(0, 30)),
    "data.mean": Knob(
        (0.0,), "Mean of images scaled to [0, 1], which is subtracted: one value, or one per channel."
    ),
    "data.std": Knob(
        (1.0,),
        "Standard deviation of images scaled to [0, 1], by which they are divided: one value, or one per "
        "channel.",
        ALL_POSITIVE,
    ),
    "data.cutout": Knob(0, "Side of the square that is set to the mean, in pixels; 0: none.", NOT_NEGATIVE),
    "data.mixup": Knob(0.0, "Alpha of mixup; 0: none.", NOT_NEGATIVE),
    "data.label_smoothing": Knob(
        0.0, "Share of each label that is spread evenly over all classes.", FRACTION
    ),
    "data.placement": Knob(
        "auto",
        "Where training and test images are: in device memory, whole (replicated) or divided (sharded), or "
        "streamed from disk. auto: the first that fits.",
        one_of(("auto", "replicated", "sharded", "stream")),
        changes_result=False,
    ),
    "data.device_share": Knob(
        0.2,
        "Largest share of a device's memory for images with placement=auto.",
        POSITIVE,
        changes_result=False,
    ),
    "data.workers": Knob(
        -1,
        "Processes that decode images; 0: threads only; -1: chosen for the machine.",
        between(-1, 1000),
        changes_result=False,
    ),
    "data.threads": Knob(
        0,
        "Decoding threads per process; 0: chosen for the machine.",
        between(0, 1000),
        changes_result=False,
    ),
    "optimizer.name": Knob(
        "sgd",
        "Optimizer. Weight decay is L2, as in PyTorch, for sgd, adam and rmsprop; decoupled for adamw, lamb "
        "and lion.",
        one_of(("sgd", "adam", "rmsprop", "adamw", "lamb", "lion")),
    ),
    "optimizer.learning_rate": Knob(0.1, "Initial learning rate.", POSITIVE),
    "optimizer.reference_batch_size": Knob(
        0,
        "Batch size that the learning rate is meant for: the rate is multiplied by train.batch_size over "
        "this (Goyal et al. 2017); 0: no scaling.",
        NOT_NEGATIVE,
    ),
    "optimizer.warmup_epochs": Knob(
        -1.0,
        "Epochs of linear warm-up, from the unscaled rate if the rate is scaled up, otherwise from 0. -1: 5 "
        "if it is scaled up, otherwise 0.",
        Rule(lambda v: v == -1 or v >= 0, "be -1, or not negative"),
    ),
    "optimizer.momentum": Knob(0.9, "Momentum of sgd and rmsprop.", FRACTION),
    "optimizer.nesterov": Knob(True, "Use Nesterov momentum with sgd."),
    "optimizer.b1": Knob(0.9, "First decay rate of adam, adamw, lamb and lion.", FRACTION),
    "optimizer.b2": Knob(
        -1.0,
        "Second decay rate of adam, adamw, lamb and lion; -1: the optimizer's own, 0.99 for lion, otherwise 0.999.",
        RATE,
    ),
    "optimizer.epsilon": Knob(
        -1.0,
        "Added to the root of the second moment (for rmsprop under the root); -1: the optimizer's own, 1e-8 "
        "for adam and adamw, 1e-6 for lamb, 1e-3 for rmsprop.",
        Rule(lambda v: v == -1 or v >= 0, "be -1, or not negative"),
    ),
    "optimizer.weight_decay": Knob(
        1e-4,
        "Weight decay of every parameter: an L2 penalty, or, for adamw, lamb and lion, decoupled.",
        NOT_NEGATIVE,
    ),
    "optimizer.decay_norm_and_bias": Knob(
        True, "Whether weight decay includes the parameters of batch norm and biases."
    ),
    "optimizer.clip_norm": Knob(
        0.0,
        "Largest global norm of the gradients of all that learns, before weight decay; longer ones are scaled "
        "down to it. 0: no limit.",
        NOT_NEGATIVE,
    ),
    "optimizer.schedule": Knob(
        "steps",
        "Learning rate schedule: drops at milestones, or half a cosine down to the final learning rate, over "
        "the steps that follow the warm-up.",
        one_of(("steps", "cosine")),
    ),
    "optimizer.final_learning_rate": Knob(
        0.0, "cosine: learning rate at the end, scaled like the learning rate.", NOT_NEGATIVE
    ),
    "optimizer.milestones": Knob(
        (0.5, 0.75), "Fractions of training at which the learning rate drops.", INCREASING_FRACTIONS
    ),
    "optimizer.decay_factor": Knob(0.1, "Factor of the learning rate at each drop.", POSITIVE),
    "optimizer.decay_every_epochs": Knob(
        0.0, "Epochs between further drops of the learning rate; 0: milestones only.", NOT_NEGATIVE
    ),
    "train.epochs": Knob(300.0, "Passes over the training set.", EPOCHS),
    "train.batch_size": Knob(128, "Examples per step, over all devices.", POSITIVE),
    "train.accumulation_steps": Knob(
        1,
        "Parts of a batch that go through the networks one after the other, with their gradients averaged; "
        "less memory (docs/scale.md).",
        POSITIVE,
    ),
    "train.rematerialize": Knob(
        False,
        "Keep only each block's input for the backward pass and recompute the rest: less memory, more "
        "arithmetic.",
        changes_result=False,
    ),
    "train.execution": Knob(
        "auto",
        "How the students' branches run: one by one (separate), branches of equal width as one (stacked), "
        "or all as one wide network (packed). auto: separate on CPUs, elsewhere the fastest as measured.",
        one_of(("auto", *EXECUTIONS)),
        changes_result=False,
    ),
    "train.fsdp": Knob(
        1,
        "Number of devices over which parameters, optimizer state and running statistics are divided.",
        POSITIVE,
        changes_result=False,
    ),
    "train.ema_decay": Knob(
        0.0,
        "Largest weight of the old value in a moving average of all weights, which is evaluated and extracted "
        "instead of the networks that learn; 0: none (docs/training.md).",
        FRACTION,
    ),
    "train.dtype": Knob("float32", "Data type of convolutions.", one_of(("float32", "bfloat16"))),
    "train.class_weights": Knob(
        (),
        "Weights of the classes in the cross entropy of the labels: balanced, or names with weights, as in "
        "('cat=2', 'dog=0.5'), where the others weigh 1; empty: all weigh 1.",
        Rule(
            _are_class_weights,
            "be balanced, or classes with weights of at least 0, as in ('cat=2', 'dog=0.5')",
        ),
    ),
    "train.patience_epochs": Knob(
        0.0,
        "Epochs after which a run ends if the ensemble's top-1 on the validation images has not risen; needs "
        "data.validation_examples. 0: no early stopping (docs/training.md).",
        NOT_NEGATIVE,
    ),
    "train.nonfinite": Knob(
        "stop",
        "When a loss is not finite: stop with an error, skip the step, or rewind to the last checkpoint and go "
        "on with a smaller learning rate (docs/reliability.md).",
        one_of(("stop", "skip", "rewind")),
    ),
    "train.nonfinite_limit": Knob(
        10, "How many steps may be skipped, or how often the run may be rewound, before it stops.", POSITIVE
    ),
    "train.rewind_factor": Knob(
        0.5, "The learning rate is multiplied by it each time the run is rewound.", SHRINKS
    ),
    "train.tracker": Knob(
        "",
        "Also log every record to Weights & Biases or trackio (docs/training.md). Empty: to neither.",
        one_of(("", *TRACKERS)),
        changes_result=False,
    ),
    "train.log_every_steps": Knob(
        100, "Steps that one training record averages.", POSITIVE, changes_result=False
    ),
    "train.evaluate_every_epochs": Knob(5.0, "Epochs between evaluations.", EPOCHS, changes_result=False),
    "train.checkpoint_every_epochs": Knob(1.0, "Epochs between checkpoints.", EPOCHS, changes_result=False),
    "evaluate.batch_size": Knob(
        500, "Examples per evaluation step, over all devices.", POSITIVE, changes_result=False
    ),
}


def method_knobs(name: str) -> dict[str, Knob]:
    """Return the knobs of a method by their full names, `method.<field>`: the fields of its class."""
    return {f"method.{field}": knob for field, knob in knobs_of(METHODS[name]).items()}


def all_knobs(method: str) -> dict[str, Knob]:
    """Return the knobs of a configuration that trains by `method`, by their full names."""
    return KNOBS | method_knobs(method)


def default_config(method: str = "oem") -> ConfigDict:
    """Return all knobs at their defaults, with those of `method`."""
    values = {path: knob.default for path, knob in all_knobs(method).items()}
    # A number or a tuple: the command line takes any literal here, and `resolve` checks it.
    values["model.students"] = FieldReference(values["model.students"], field_type=object)
    values["method.name"] = method
    return ConfigDict(nest(values))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"section": {"name": value}}` of `{"section.name": value}`."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        section, _, name = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested
