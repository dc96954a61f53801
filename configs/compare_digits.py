"""Every method on the UCI handwritten digits: ResNet-8, students of width 1, .6 and .2, 30 epochs.

    python -m ekd_jax.compare --config=configs/compare_digits.py
    python -m ekd_jax.compare --config=configs/compare_digits.py --methods=oem,kd --seeds=1

Data and optimiser are those of configs/digits.py, for a third of its epochs; which labels there are says
ekd_jax/compared.py. One seed of all 26 labels took 31 minutes, 17 of processor time, on two CPU cores that
had other work; a run of oem 63 seconds, compiling included.
"""

from ml_collections import ConfigDict

from ekd_jax.config.knobs import default_config
from ekd_jax.config.recipes import every_method, parse_variant


def get_config(argument: str | None = None) -> ConfigDict:
    """No variants."""
    parse_variant(argument)
    config = default_config("baseline")
    config.model.name, config.model.students = "resnet8", (1, 0.6, 0.2)
    config.data.name = "digits"
    config.data.mean, config.data.std = (0.3053,), (0.3760,)
    config.data.crop_padding, config.data.flip = 1, False
    config.train.epochs, config.train.batch_size = 30.0, 64
    config.train.evaluate_every_epochs, config.train.checkpoint_every_epochs = 10.0, 10.0
    return ConfigDict(
        {"common": config, "seeds": 3, "methods": every_method(config.train.epochs)}, convert_dict=False
    )
