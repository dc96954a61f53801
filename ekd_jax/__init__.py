"""Online ensemble knowledge distillation in JAX: a family of compressed classifiers in one run."""

from typing import TYPE_CHECKING, Any

from ekd_jax.version import __version__

__all__ = ["__version__", "load_student"]

if TYPE_CHECKING:
    from ekd_jax.students.student import load_student


def __getattr__(name: str) -> Any:
    if name == "load_student":  # on demand: importing the package must not start JAX
        from ekd_jax.students.student import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
