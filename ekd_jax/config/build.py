"""From a configuration to networks and method: the one place where they are built."""

import dataclasses
from functools import cached_property
from typing import Any

from ml_collections import FrozenConfigDict

from ekd_jax.common.errors import UserError
from ekd_jax.methods import METHODS
from ekd_jax.methods.base import Method
from ekd_jax.models import EnsembleSpec, build
from ekd_jax.models.ensemble import Ensemble, EnsembleTrace
from ekd_jax.models.members import parse_students

NETWORK_OPTIONS = ("dropout", "stochastic_depth", "padding", "batch_norm_epsilon")


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a configuration and the method that trains them, for images of one shape.

    Attributes:
        method: how they learn.
        ensemble: the students.
        input_shape: H, W, C.
        frozen_stages: the stem and so many stages do not learn; -1: everything learns.
        ema_decay: largest weight of the old value in the moving average of all weights; 0: there is none.
    """

    method: Method
    ensemble: Ensemble
    input_shape: tuple[int, int, int]
    frozen_stages: int = -1
    ema_decay: float = 0.0

    @cached_property
    def trace(self) -> EnsembleTrace:
        """Shapes, initial variables and costs for one image; traced when they are first needed."""
        return self.ensemble.trace(self.input_shape)

    def with_execution(self, mode: str) -> "Networks":
        """Return the same networks, whose branches run in another execution mode."""
        changed = dataclasses.replace(self, ensemble=dataclasses.replace(self.ensemble, execution=mode))
        changed.__dict__["trace"] = self.trace  # it is the same for every mode
        return changed

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """Names of the parts of a network that do not learn."""
        return ("stem", *(f"stage{i}" for i in range(1, self.frozen_stages + 1)))[: self.frozen_stages + 1]

    @property
    def number_of_copies(self) -> int:
        """Number of copies of the networks that predict instead of them: the method's, or the moving average."""
        return self.method.number_of_copies or int(self.ema_decay > 0)

    @property
    def students(self) -> int:
        """Number of students that can be extracted. If there are copies, each copy has its students."""
        return len(self.ensemble.students) * max(1, self.number_of_copies)


def build_networks(
    config: FrozenConfigDict, num_classes: int, input_shape: tuple[int, int, int], devices: int = 1
) -> Networks:
    """Build the networks and the method that `config` asks for. Nothing is traced or computed.

    Args:
        config: a complete configuration.
        num_classes: K.
        input_shape: H, W, C of the images.
        devices: how many share a batch; matters for `model.batch_norm=local`.

    Raises:
        UserError: the network or the method does not allow what is asked for.
    """
    model, method, ema_decay = config.model, build_method(config), config.train.ema_decay
    if ema_decay and method.number_of_copies:
        raise UserError(
            f"train.ema_decay={ema_decay:g}: {config.method.name} keeps copies of its own, which are evaluated "
            f"and extracted: leave it out, or take another method"
        )
    spec = EnsembleSpec(
        name=model.name,
        students=parse_students(model.students),
        num_classes=num_classes,
        dtype=config.train.dtype,
        sharing=model.sharing or method.sharing,
        compressed_stages=model.compressed_stages,
        shared_stages=model.shared_stages,
        own_stages=method.own_stages,
        frozen_stages=model.frozen_stages,
        last_map=model.last_map,
        base_gradients=method.base_gradients,
        batch_norm_groups=devices if model.batch_norm == "local" else 1,
        rematerialize=config.train.rematerialize,
        execution="separate" if config.train.execution == "auto" else config.train.execution,
        **network_options(config),
    )
    return Networks(method, build(spec), input_shape, model.frozen_stages, ema_decay)


def build_method(config: FrozenConfigDict) -> Method:
    """Build the method that `config.method` describes; raise UserError for a value out of range."""
    fields = config.method.to_dict()
    return METHODS[fields.pop("name")](**fields)


def network_options(config: FrozenConfigDict) -> dict[str, Any]:
    """Return the options that belong to a network itself, wherever its students part."""
    return {name: config.model[name] for name in NETWORK_OPTIONS}
