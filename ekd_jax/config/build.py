"""The ensemble and the method of a configuration."""

from typing import Any

from ekd_jax.methods import METHODS
from ekd_jax.models import EnsembleSpec, build
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.models.members import parse_students

NETWORK_OPTIONS = ("dropout", "stochastic_depth", "padding", "batch_norm_epsilon")


def network_options(config: Any) -> dict[str, Any]:
    """Return the settings of `config.model` that define a network besides its name and widths."""
    return {name: config.model[name] for name in NETWORK_OPTIONS}


def ensemble_spec(config: Any, num_classes: int, devices: int = 1) -> EnsembleSpec:
    """Return the ensemble that `config` asks for, to be trained on this number of devices."""
    model, train, method = config.model, config.train, make_method(config)
    return EnsembleSpec(
        name=model.name,
        students=parse_students(model.students),
        num_classes=num_classes,
        dtype=train.dtype,
        sharing=model.sharing or method.sharing,
        compressed_stages=model.compressed_stages,
        shared_stages=model.shared_stages,
        own_stages=method.own_stages,
        last_map=model.last_map,
        base_gradients=method.base_gradients,
        batch_norm_groups=devices if model.batch_norm == "local" else 1,
        rematerialize=train.rematerialize,
        execution="separate" if train.execution == "auto" else train.execution,
        **network_options(config),
    )


def make_ensemble(config: Any, num_classes: int, devices: int = 1) -> Ensemble:
    """Build the ensemble of `config`.

    Raises:
        UserError: the network or the method does not allow it.
    """
    return build(ensemble_spec(config, num_classes, devices))


def make_method(config: Any) -> Any:
    """The method that `config.method` describes; raises UserError for a value out of range."""
    fields = config.method.to_dict()
    return METHODS[fields.pop("name")](**fields)
