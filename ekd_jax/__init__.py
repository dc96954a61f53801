"""Online ensemble knowledge distillation in JAX: a family of compressed classifiers from one run.

The names below are loaded when they are first used: importing the package starts neither JAX nor anything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ekd_jax.version import __version__

if TYPE_CHECKING:
    from ekd_jax import data, methods, models
    from ekd_jax.api import load_recipe, train, train_seeds
    from ekd_jax.common.errors import Interrupted, UserError
    from ekd_jax.config.knobs import default_config
    from ekd_jax.data import from_arrays, list_datasets, register_dataset
    from ekd_jax.methods import list_methods, losses, register_method
    from ekd_jax.models import build_ensemble, list_models, register_network
    from ekd_jax.runs.evaluation import evaluate_student
    from ekd_jax.runs.exporting import export_student
    from ekd_jax.runs.records import Summary
    from ekd_jax.runs.run import Run, load_run
    from ekd_jax.students.formats.timing import benchmark_student
    from ekd_jax.students.student import LoadedStudent, load_student

# name -> the module that has it; a namespace is a module itself
_PLACES = {
    "train": "api",
    "train_seeds": "api",
    "load_recipe": "api",
    "default_config": "config.knobs",
    "Summary": "runs.records",
    "Run": "runs.run",
    "load_run": "runs.run",
    "LoadedStudent": "students.student",
    "load_student": "students.student",
    "evaluate_student": "runs.evaluation",
    "export_student": "runs.exporting",
    "benchmark_student": "students.formats.timing",
    "build_ensemble": "models",
    "list_models": "models",
    "register_network": "models",
    "list_methods": "methods",
    "register_method": "methods",
    "from_arrays": "data",
    "list_datasets": "data",
    "register_dataset": "data",
    "UserError": "common.errors",
    "Interrupted": "common.errors",
}
_NAMESPACES = {"losses": "methods.losses", "methods": "methods", "models": "models", "data": "data"}

__all__ = [
    "Interrupted",
    "LoadedStudent",
    "Run",
    "Summary",
    "UserError",
    "__version__",
    "benchmark_student",
    "build_ensemble",
    "data",
    "default_config",
    "evaluate_student",
    "export_student",
    "from_arrays",
    "list_datasets",
    "list_methods",
    "list_models",
    "load_recipe",
    "load_run",
    "load_student",
    "losses",
    "methods",
    "models",
    "register_dataset",
    "register_method",
    "register_network",
    "train",
    "train_seeds",
]


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f"ekd_jax.{_NAMESPACES[name]}")
    if name in _PLACES:
        return getattr(importlib.import_module(f"ekd_jax.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
