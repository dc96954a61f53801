"""The training program of a setting on images made up: what the benchmarks compile, time and read."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ekd_jax.common import parallel
from ekd_jax.config.build import make_ensemble, make_method
from ekd_jax.config.knobs import default_config
from ekd_jax.config.resolve import resolve
from ekd_jax.data.arrays import ArrayExamples
from ekd_jax.data.dataset import Facts
from ekd_jax.data.decode import Reader
from ekd_jax.data.opening import Data
from ekd_jax.data.resident import Resident
from ekd_jax.runs.state import init_state
from ekd_jax.training.optimizer import make_optimizer
from ekd_jax.training.step import make_train_steps, zero_metrics

OF_IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext", "wide_resnet")
OF_IMAGENET += ("densenet121", "efficientnet", "mobilenet_v2", "shufflenet_v2_x")


def is_of_imagenet(name: str) -> bool:
    """Whether a network is one for 224x224 images of 1000 classes, not 32x32 of 100."""
    return name.startswith(OF_IMAGENET) and not name.endswith("_cifar")


def configuration(model: str, students: Any, batch_size: int, method: str = "oem", **knobs: Any) -> Any:
    """The defaults with these changes, resolved; `train__dtype="bfloat16"` sets train.dtype."""
    config = default_config(method)
    config.model.name, config.model.students, config.train.batch_size = model, students, batch_size
    for knob, value in knobs.items():
        group, name = knob.split("__")
        config[group][name] = value
    return resolve(config)


class Program:
    """The training step of a configuration, its state on the devices and noise to train on.

    Attributes:
        config, ensemble, trace, method: as of a run.
        state: before the first step, numpy arrays.
        feed: a training set on the devices.
        carry: what a dispatch changes: state and sums, on the devices; donated to it.
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
        """`examples`: one batch if 0; `devices`: all if 0."""
        mesh = parallel.make_mesh(jax.devices()[: devices or None], config.train.fsdp)
        shape, examples = (image_size, image_size, 3), examples or config.train.batch_size
        self.config, self.mesh, self.shape, self.classes = config, mesh, shape, classes
        self.method, self.ensemble = make_method(config), make_ensemble(config, classes, mesh.size)
        self.optimizer = make_optimizer(config, self.method, steps=1_000_000)
        self.trace = self.ensemble.trace(shape)
        self.state = init_state(self.trace, self.method, self.optimizer, 0)
        sums = zero_metrics(self.trace, self.method, self.state)
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (examples, *shape), dtype=np.uint8)
        noise = ArrayExamples(images, generator.integers(0, classes, examples).astype(np.int32), "noise")
        facts = Facts("noise", shape, tuple(map(str, range(classes))), examples, 0)
        self.feed = Resident(config, Data(facts, noise, None, noise, Reader(shape)), mesh, placement)
        self._shardings = parallel.state_shardings(mesh, self.state)
        self.carry: Sequence[Any] = (
            parallel.place(self.state, self._shardings),
            parallel.replicate(mesh, sums),
        )
        frozen = {"teachers": [], "key": jax.random.key_data(jax.random.key(0))}
        self._frozen = parallel.replicate(mesh, frozen)

    def arguments(self, steps: int = 1) -> tuple[Any, ...]:
        """Of the program, for so many steps from the first."""
        number = parallel.replicate(self.mesh, np.int32(steps))
        return *self.carry, self.feed.load(0), number, self._frozen

    def lower(self) -> Any:
        """Traces; `.compile()` of what it gives compiles."""
        jitted = make_train_steps(
            self.config,
            self.ensemble,
            self.method,
            self.optimizer,
            self.feed,
            self.classes,
            self.mesh,
            1_000_000,
            shardings=self._shardings,
        )
        return jitted.lower(*self.arguments())
