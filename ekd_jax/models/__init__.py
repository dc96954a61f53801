"""Networks, and ensembles of students that share a base block."""

from ekd_jax.models.assemble import EnsembleSpec
from ekd_jax.models.linen import linen_network
from ekd_jax.models.registry import MODELS, build, build_ensemble, list_models, register_network

__all__ = [
    "MODELS",
    "EnsembleSpec",
    "build",
    "build_ensemble",
    "linen_network",
    "list_models",
    "register_network",
]
