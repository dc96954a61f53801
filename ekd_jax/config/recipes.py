"""Protocols that the recipes in configs/ share.

The paper states epochs, optimizers and drops of the learning rate (docs/reference/oem.md#training-protocol). It
does not state batch size, weight decay and augmentation; `paper` says what is used for them.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ekd_jax.common.errors import UserError, nearest
from ekd_jax.config.knobs import default_config


def parse_variant(argument: str | None, **choices: tuple[Any, ...]) -> SimpleNamespace:
    """Return the values that follow the colon in `--config=file.py:depth=110,recipe=official`.

    Args:
        argument: the text after the colon, as `get_config` receives it; None if there is none.
        **choices: the allowed values of each name; the first is the default.

    Raises:
        UserError: a name or value is unknown.
    """
    values = {name: allowed[0] for name, allowed in choices.items()}
    for part in filter(None, (argument or "").split(",")):
        name, _, text = part.partition("=")
        if not choices:
            raise UserError(f"this config has no variants, remove {part!r} after the colon")
        if name not in choices:
            raise UserError(f"this config has no variant {name!r}{nearest(name, choices)}")
        by_text = {str(value): value for value in choices[name]}
        if text not in by_text:
            raise UserError(f"variant {name}={text!r} is unknown{nearest(text, by_text)}")
        values[name] = by_text[text]
    return SimpleNamespace(**values)


class PaperData(NamedTuple):
    """A data set of the paper.

    Attributes:
        name: its name in TFDS.
        epochs: how long the paper trains on it.
        mean: the mean of each channel over the training images, scaled to [0, 1].
        std: the standard deviation of each channel.
    """

    name: str
    epochs: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATA = {
    "cifar10": PaperData("cifar10", 350, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": PaperData("cifar100", 450, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": PaperData("svhn_cropped", 50, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": PaperData("imagenet2012", 100, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def use_data(config: ConfigDict, data: str) -> None:
    """Set the name and the normalization of a data set, a key of `DATA`."""
    chosen = DATA[data]
    config.data.name, config.data.mean, config.data.std = chosen.name, chosen.mean, chosen.std


def paper(model: str, data: str) -> ConfigDict:
    """Return the paper's protocol for `model`, a key of `models.MODELS`, on `data`, a key of `DATA`.

    The optimizer is that of `default_config()`: SGD with Nesterov momentum 0.9, learning rate 0.1, divided by
    10 at 50 % and 75 % of training. What the paper leaves open is chosen here:

    * weight decay 1e-4, as in the official CIFAR-10 configs; batch size 128, on ImageNet 256;
    * CIFAR: random crop of the image padded by 4, and flip;
    * SVHN: only the crop, because a mirrored 2 is not a 2; evaluation after every epoch;
    * ImageNet: random part of the image resized to 224, and flip; evaluation on the center of the image
      resized to 256.
    """
    config = default_config()
    config.model.name = model
    use_data(config, data)
    config.train.epochs = float(DATA[data].epochs)
    if data == "svhn":
        config.data.flip = False
        config.train.evaluate_every_epochs = 1.0
    if data == "imagenet":
        config.data.fit, config.data.image_size, config.data.crop_padding = "crop", 224, 0
        config.train.batch_size = 256
    return config


# The official code's CIFAR-10 configs:
# depth -> learning rate, epochs, epochs at which the rate drops, weights alpha, beta, gamma.
OFFICIAL_CIFAR10 = {
    20: (0.01, 400, (100, 180, 250, 350), (0.4, 0.2, 0.4)),
    32: (0.1, 400, (50, 130, 220, 270), (0.4, 0.3, 0.3)),
    110: (0.001, 250, (100, 150), (1.0, 1.0, 1.0)),
}


def resnet_cifar(argument: str | None, data: tuple[str, ...]) -> ConfigDict:
    """Return the configuration of configs/resnet_cifar.py, whose docstring explains the variants.

    Args:
        argument: the text after the colon in `--config=FILE:data=svhn,depth=110`.
        data: keys of `DATA` to choose from; the first is the default.

    Raises:
        UserError: a variant is unknown, or the official code has no config for it.
    """
    variant = parse_variant(argument, data=data, depth=(20, 32, 44, 56, 110), recipe=("paper", "official"))
    config = paper(f"resnet{variant.depth}", variant.data)
    match variant.recipe, variant.data:
        case "official", "cifar10":
            _official_cifar10(config, variant.depth)
        case "official", "cifar100":
            _official_cifar100(config, variant.depth)
        case "official", other:
            raise UserError(
                f"the official code has no config for ResNets on {other.upper()}: use recipe=paper"
            )
    return config


def _official_cifar10(config: ConfigDict, depth: int) -> None:
    """Set the constants of the official code for CIFAR-10 (docs/reference/oem.md#official-configurations)."""
    if depth not in OFFICIAL_CIFAR10:
        raise UserError(
            f"the official code has no config for depth={depth} on CIFAR-10: use depth=20, 32 or 110, or "
            f"recipe=paper"
        )
    rate, epochs, drops, weights = OFFICIAL_CIFAR10[depth]
    config.optimizer.nesterov, config.optimizer.learning_rate = False, rate
    config.train.epochs, config.optimizer.milestones = float(epochs), tuple(d / epochs for d in drops)
    config.method.temperature = 3.0
    config.method.alpha, config.method.beta, config.method.gamma = weights


def _official_cifar100(config: ConfigDict, depth: int) -> None:
    """Set the constants of the official code for CIFAR-100 (docs/reference/oem.md#official-configurations)."""
    config.data.mean, config.data.std = (0.0,), (1.0,)
    config.optimizer.name, config.optimizer.learning_rate = "adam", 1e-3
    config.optimizer.weight_decay = 1e-5
    config.train.epochs, config.optimizer.milestones = 350.0, (200 / 350, 300 / 350)
    if depth == 20:
        config.train.epochs, config.train.batch_size = 400.0, 64
        config.optimizer.milestones = (100 / 400, 180 / 400, 240 / 400, 350 / 400)
        config.method.temperature = 3.0
        config.method.alpha, config.method.beta, config.method.gamma = 0.4, 0.3, 0.3


def rmsprop(config: ConfigDict) -> None:
    """Set EfficientNet's optimizer: RMSProp, whose learning rate is multiplied by 0.97 every 3 epochs.

    Tan and Le 2019 trained with batches of 4096, to which a learning rate of 0.256 and an epsilon of 1e-3
    belong. The paper does not say for which batch size it took over the rate, so it is scaled by the batch
    size here.
    """
    config.optimizer.name, config.optimizer.momentum = "rmsprop", 0.9
    config.optimizer.learning_rate = 0.256 * config.train.batch_size / 4096
    config.optimizer.decay_factor, config.optimizer.decay_every_epochs = 0.97, 3.0
    config.optimizer.milestones = ()


def digits(epochs: float) -> ConfigDict:
    """Return the protocol of configs/digits.py for a number of epochs: the paper's for CIFAR, without flip."""
    config = default_config()
    config.model.name = "resnet8"
    config.data.name = "digits"
    config.data.mean, config.data.std = (0.3053,), (0.3760,)
    config.data.crop_padding, config.data.flip = 1, False
    config.train.epochs, config.train.batch_size = epochs, 64
    config.train.evaluate_every_epochs = config.train.checkpoint_every_epochs = 10.0
    return config


Knobs = dict[str, object]
ONE_STUDENT: Knobs = {"model.students": (1,)}


def comparison(common: ConfigDict) -> ConfigDict:
    """Return a comparison of all methods on the network, data and epochs of `common`, with three seeds.

    All train three students of width 1, 0.6 and 0.2 where the method allows it.
    """
    common.model.students = (1, 0.6, 0.2)
    methods = every_method(common.train.epochs)
    return ConfigDict({"common": common, "seeds": 3, "methods": methods}, convert_dict=False)


def every_method(epochs: float) -> dict[str, Knobs]:
    """Return the knobs of every run of a comparison, by its label.

    The runs take `epochs` epochs. Ramp-ups and warm-ups, which the authors of the methods state in epochs of
    a longer training, take the same share of it. `"{label}:1"` is student 1 of the run of that label and
    seed.

    Students are replaced where a method does not allow those of the comparison: OKDDip's attention needs
    peers of equal width, as do the four heads of CL's tree; Snapshot Ensembles take snapshots of one network;
    MEAL V2, SRM and block-wise compression train one student.
    """
    alone: dict[str, Knobs] = {"baseline": {"method.name": "baseline"}}
    return alone | _together(epochs) | _from_teachers(epochs)


def _together(epochs: float) -> dict[str, Knobs]:
    """Return the runs whose students learn from each other."""
    oem: Knobs = {"method.name": "oem"}
    ramp_up = _ramp_up(epochs)
    return {
        "oem": oem,
        **{f"oem_{name}": oem | loss for name, loss in _losses(epochs).items()},
        "dml": {"method.name": "dml"},
        "one": {"method.name": "one", **ramp_up},
        "okddip": {"method.name": "okddip", "model.students": (1, 1, 1), **ramp_up},
        "cl_ilr": {"method.name": "cl_ilr", "model.students": (1, 1, 1, 1)},
        "ffl": {"method.name": "ffl", **ramp_up},
        "pcl": {"method.name": "pcl", **ramp_up},
        "kdcl": {"method.name": "kdcl"},
        "byot": {"method.name": "byot"},
        "snapshot": {"method.name": "snapshot", **ONE_STUDENT, "method.cycles": 3},
    }


def _from_teachers(epochs: float) -> dict[str, Knobs]:
    """Return the runs whose students learn from frozen teachers; the last two train these themselves."""
    losses = _losses(epochs)
    one_teacher: Knobs = {"method.teachers": ("{baseline}:1",)}
    two_teachers: Knobs = {"method.teachers": ("{baseline}:1", "{dml}:1")}
    kd: Knobs = {"method.name": "kd", **one_teacher}
    equal_weights: Knobs = {"method.ce_weight": 1.0, "method.kd_weight": 1.0}
    return {
        "kd": kd,
        "kd_dkd": {**kd, **equal_weights, **losses["dkd"]},
        "kd_dist": {**kd, **equal_weights, **losses["dist"]},
        "kd_lskd": {**kd, **losses["lskd"], "method.kd_weight": 9.0, "method.temperature": 2.0},
        "dckd": {"method.name": "dckd", **one_teacher, **_ramp_up(epochs)},
        "ekd": {"method.name": "ekd", "method.teachers": ("{baseline}:1", "{oem}:1", "{dml}:1")},
        "meal": {"method.name": "meal", **two_teachers},
        "meal_v2": {
            "method.name": "meal_v2",
            **two_teachers,
            **ONE_STUDENT,
            "model.initial_weights": "{baseline}:1",
            "optimizer.learning_rate": 0.01,
        },
        "srm": {
            "method.name": "srm",
            **one_teacher,
            **ONE_STUDENT,
            "method.dictionary_epochs": epochs / 2,
            "method.initialize_epochs": epochs / 2,
        },
        "blockwise": {"method.name": "blockwise", **one_teacher, **ONE_STUDENT},
        "self_distillation": {"method.name": "self_distillation"},
        "ensemble_distillation": {"method.name": "ensemble_distillation", "method.members": 3},
    }


def _ramp_up(epochs: float) -> Knobs:
    """Return ONE's ramp-up, 80 of 300 epochs."""
    return {"method.rampup_epochs": epochs * 80 / 300}


def _losses(epochs: float) -> dict[str, Knobs]:
    """Return the alternatives to the KL divergence as KD loss."""
    return {
        "dkd": {"method.kd_loss": "dkd", "method.dkd_warmup_epochs": epochs * 20 / 240},
        "dist": {"method.kd_loss": "dist"},
        "lskd": {"method.standardize": True},
    }
