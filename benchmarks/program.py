"""The training program of a configuration with random images, which the benchmarks compile and time."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ekd_jax.common import parallel
from ekd_jax.common.errors import UserError, nearest
from ekd_jax.config.knobs import default_config
from ekd_jax.config.resolve import resolve
from ekd_jax.data.arrays import ARRAYS, from_arrays
from ekd_jax.data.dataset import Source
from ekd_jax.data.resident import Resident
from ekd_jax.models import MODELS
from ekd_jax.runs.state import init_state
from ekd_jax.training.setup import prepare
from ekd_jax.training.step import make_train_steps, zero_tally
from ekd_jax.training.teaching import make_teach

IMAGENET_PREFIXES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext", "wide_resnet")
IMAGENET_PREFIXES += ("densenet121", "efficientnet", "mobilenet_v2", "shufflenet_v2_x")


def is_for_imagenet(model: str) -> bool:
    """Return whether a network is for 224x224 images of 1000 classes, and not for 32x32 images of 100."""
    return model.startswith(IMAGENET_PREFIXES) and not model.endswith("_cifar")


def check_models(names: Sequence[str]) -> None:
    """Raise UserError if a name of the flag --models is unknown."""
    for name in names:
        if name not in MODELS:
            raise UserError(f"--models: {name} is unknown{nearest(name, MODELS)}")


def configuration(model: str, students: Any, batch_size: int, method: str = "oem", **knobs: Any) -> Any:
    """Return the default configuration with these changes; `train__dtype="bfloat16"` sets train.dtype."""
    config = default_config(method)
    config.model.name, config.model.students, config.train.batch_size = model, students, batch_size
    config.data.name = ARRAYS
    for knob, value in knobs.items():
        section, name = knob.split("__")
        config[section][name] = value
    return resolve(config)


def with_data_of(config: Any, source: Source) -> FrozenConfigDict:
    """Return the configuration with all images of a set in memory as its data."""
    changed = ConfigDict(config)
    own = {"name": source.name, "train_examples": 0, "validation_examples": 0, "image_size": 0}
    changed.data.update({**own, "fit": "native"})
    return FrozenConfigDict(changed)


class Program:
    """The training step of a configuration with its state and random images on the devices.

    Attributes:
        setup: the setup of a run on random images.
        state: the state before the first step, as NumPy arrays.
        feed: the training set on the devices.
        carry: state and tally of metrics on the devices; every dispatch replaces them, and they are donated.
    """

    def __init__(
        self,
        config: Any,
        image_size: int = 32,
        classes: int = 100,
        examples: int = 0,
        devices: int = 0,
        placement: str = "replicated",
    ):
        """Place everything on the devices.

        Args:
            config: a resolved configuration.
            image_size: height and width of the images.
            classes: number of classes.
            examples: number of images; 0: one batch.
            devices: number of devices; 0: all.
            placement: `data.placement`: replicated or sharded.
        """
        self.mesh = parallel.make_mesh(jax.devices()[: devices or None], config.train.fsdp)
        source = random_images(examples or config.train.batch_size, image_size, classes)
        config = with_data_of(config, source)
        self.setup = prepare(config, self.mesh, source=source)
        networks = self.setup.networks
        self.state = init_state(networks, self.setup.optimizer, seed=0)
        self.feed = Resident(config, self.setup.data, self.mesh, placement)
        self._shardings = parallel.state_shardings(self.mesh, self.state)
        self.carry: Sequence[Any] = (
            parallel.place(self.state, self._shardings),
            parallel.replicate(self.mesh, zero_tally(self.setup, self.state)),
        )
        frozen = {"teachers": [], "key": jax.random.key_data(jax.random.key(0))}
        self._frozen = parallel.replicate(self.mesh, frozen)

    def arguments(self, steps: int = 1) -> tuple[Any, ...]:
        """Return the arguments of the compiled program that make it take `steps` steps."""
        number = parallel.replicate(self.mesh, np.int32(steps))
        return *self.carry, self.feed.load(0), number, self._frozen

    def lower(self) -> Any:
        """Trace the program; `.compile()` of the result compiles it."""
        teach = make_teach([], self.setup.config.data)
        return make_train_steps(self.setup, self.feed, teach, self._shardings).lower(*self.arguments())


def random_images(examples: int, size: int, classes: int) -> Source:
    """Return a data set of random images (size, size, 3)."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (examples, size, size, 3), dtype=np.uint8)
    labels = generator.integers(0, classes, examples)
    return from_arrays(images, labels, [str(i) for i in range(classes)], images[:1], labels[:1])
