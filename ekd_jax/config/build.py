"""TODO: config.build."""

from typing import Any

from ekd_jax.methods import METHODS
from ekd_jax.models import build
from ekd_jax.models.ensemble import Ensemble
from ekd_jax.models.members import parse_students


def network_options(config: Any) -> dict[str, Any]:
    """What `models.build` is told about the networks beside their names and what they share."""
    names = ("dropout", "stochastic_depth", "padding", "batch_norm_epsilon")
    return {name: config.model[name] for name in names}


def make_ensemble(config: Any, num_classes: int, devices: int = 1) -> Ensemble:
    """The ensemble that `config` asks for, trained on so many devices; raises UserError for one that the
    network or the method does not allow."""
    model, method = config.model, make_method(config)
    return build(
        model.name,
        parse_students(model.students),
        num_classes,
        config.train.dtype,
        sharing=model.sharing or method.sharing,
        compressed_stages=model.compressed_stages,
        shared_stages=model.shared_stages,
        own_stages=method.own_stages,
        last_map=model.last_map,
        base_gradients=method.base_gradients,
        batch_norm_groups=devices if model.batch_norm == "local" else 1,
        rematerialize=config.train.rematerialize,
        execution="separate" if config.train.execution == "auto" else config.train.execution,
        **network_options(config),
    )


def make_method(config: Any) -> Any:
    """The method that `config.method` describes; raises UserError for a value out of range."""
    fields = config.method.to_dict()
    return METHODS[fields.pop("name")](**fields)
