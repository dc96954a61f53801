"""What recipes share: how each data set is read, and for how long the paper trains on it.

METHODS.md 1.7, the paper's experimental setup: epochs, optimizers and drops are the paper's; batch size,
weight decay and augmentation, which it does not state, are said here and in the recipes.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.config.knobs import default_config


def parse_variant(argument: str | None, **choices: tuple[Any, ...]) -> ConfigDict:
    """The values after the colon of `--config=file.py:depth=110,recipe=official`.

    Args:
        argument: what `get_config` was given.
        **choices: what a recipe can be asked for, name=(default, other, ...).

    Raises:
        UserError: an unknown name or value.
    """
    values = {name: allowed[0] for name, allowed in choices.items()}
    for part in filter(None, (argument or "").split(",")):
        name, _, text = part.partition("=")
        if not choices:
            raise UserError(f"this config takes no argument, not {part!r}")
        if name not in choices:
            raise UserError(f"this config knows no argument {name!r}{nearest(name, choices)}")
        by_text = {str(value): value for value in choices[name]}
        if text not in by_text:
            raise UserError(f"config argument {name}={text!r} is unknown{nearest(text, by_text)}")
        values[name] = by_text[text]
    return ConfigDict(values)


class Protocol(NamedTuple):
    """Name in TFDS, epochs of the paper, channel means and deviations of the training images."""

    name: str
    epochs: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATA = {
    "cifar10": Protocol("cifar10", 350, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Protocol("cifar100", 450, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": Protocol("svhn_cropped", 50, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": Protocol("imagenet2012", 100, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def paper(model: str, data: str) -> ConfigDict:
    """The paper's protocol for `model` on `data`.

    CIFAR: random crop of the image padded by 4, flip. SVHN: the crop alone, as a mirrored 2 is no 2;
    evaluated every epoch. ImageNet: random part of the image resized to 224, flip; evaluated on the middle
    of the image resized to 256. SGD as `default_config()`: Nesterov .9, .1 -> .01 -> .001 at 50 and 75 %,
    weight decay 1e-4; batches of 128, for ImageNet 256.

    Args:
        model: a key of `models.MODELS`.
        data: a key of `DATA`.
    """
    config, protocol = default_config(), DATA[data]
    config.model.name, config.data.name = model, protocol.name
    config.data.mean, config.data.std = protocol.mean, protocol.std
    config.train.epochs = float(protocol.epochs)
    if data == "svhn":
        config.data.flip = False
        config.train.evaluate_every_epochs = 1.0
    if data == "imagenet":
        config.data.fit, config.data.image_size, config.data.crop_padding = "crop", 224, 0
        config.train.batch_size = 256
    return config


def official_imagenet_augmentation(config: ConfigDict) -> None:
    """The official code's: the image stretched to the network's size and padded by 50, rotated by up to 10
    degrees, cropped and flipped; measured on the stretched image."""
    config.data.fit, config.data.crop_padding, config.data.rotation = "stretch", 50, 10.0


def rmsprop(config: ConfigDict) -> None:
    """EfficientNet's optimizer: RMSProp of decay .9 and momentum .9, rate .256 times .97 every 3 epochs.

    .256 belongs to the batches of 4096 that EfficientNet was trained with, as does an epsilon of 1e-3; the
    paper does not say for which batch it took it. The rate is scaled by the batch here, so that it means
    the same.
    """
    config.optimizer.name, config.optimizer.momentum = "rmsprop", 0.9
    config.optimizer.learning_rate = 0.256 * config.train.batch_size / 4096
    config.optimizer.decay_factor, config.optimizer.decay_every_epochs = 0.97, 3.0
    config.optimizer.milestones = ()


Labels = dict[str, dict[str, Any]]


def every_method(epochs: float) -> Labels:
    """Labels of a comparison whose runs have so many epochs and three students of unequal width.

    Not of these widths are OKDDip's students, whose attention is among peers of the same width, and the
    four heads of CL's tree: all are as wide as student 1. Snapshot's are three snapshots of one network;
    MEAL V2, SRM and block-wise compression train one.
    """
    ramp_up = {"method.rampup_epochs": epochs * 80 / 300}  # ONE's
    dkd = {"method.kd_loss": "dkd", "method.dkd_warmup_epochs": epochs * 20 / 240}
    dist = {"method.kd_loss": "dist"}
    lskd = {"method.standardize": True}
    one_teacher = {"method.teachers": ("{baseline}:1",)}
    weights = {"method.ce_weight": 1.0, "method.kd_weight": 1.0}
    kd = {"method.name": "kd", **one_teacher}
    return {
        "baseline": {"method.name": "baseline"},
        "oem": {"method.name": "oem"},
        "oem_dkd": {"method.name": "oem", **dkd},
        "oem_dist": {"method.name": "oem", **dist},
        "oem_lskd": {"method.name": "oem", **lskd},
        # students together
        "dml": {"method.name": "dml"},
        "one": {"method.name": "one", **ramp_up},
        "okddip": {"method.name": "okddip", "model.students": (1, 1, 1), **ramp_up},
        "cl_ilr": {"method.name": "cl_ilr", "model.students": (1, 1, 1, 1)},
        "ffl": {"method.name": "ffl", **ramp_up},
        "pcl": {"method.name": "pcl", **ramp_up},
        "kdcl": {"method.name": "kdcl"},
        "byot": {"method.name": "byot"},
        "snapshot": {"method.name": "snapshot", "model.students": (1,), "method.cycles": 3},
        # students of frozen teachers
        "kd": kd,
        "kd_dkd": {**kd, **weights, **dkd},
        "kd_dist": {**kd, **weights, **dist},
        "kd_lskd": {**kd, **lskd, "method.kd_weight": 9.0, "method.temperature": 2.0},
        "dckd": {"method.name": "dckd", **one_teacher, **ramp_up},
        "ekd": {"method.name": "ekd", "method.teachers": ("{baseline}:1", "{oem}:1", "{dml}:1")},
        "meal": {"method.name": "meal", "method.teachers": ("{baseline}:1", "{dml}:1")},
        "meal_v2": {
            "method.name": "meal_v2",
            "method.teachers": ("{baseline}:1", "{dml}:1"),
            "model.students": (1,),
            "model.initial_weights": "{baseline}:1",
            "optimizer.learning_rate": 0.01,
        },
        "srm": {
            "method.name": "srm",
            **one_teacher,
            "model.students": (1,),
            "method.dictionary_epochs": epochs / 2,
            "method.initialize_epochs": epochs / 2,
        },
        "blockwise": {"method.name": "blockwise", **one_teacher, "model.students": (1,)},
        # teachers of their own
        "self_distillation": {"method.name": "self_distillation"},
        "ensemble_distillation": {"method.name": "ensemble_distillation", "method.members": 3},
        # a new method: its label here
    }
