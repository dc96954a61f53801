"""Images and labels: where they come from, in which order they are read, and how they are augmented."""

from typing import TYPE_CHECKING, Any

__all__ = [
    "Example",
    "Examples",
    "Facts",
    "Source",
    "from_arrays",
    "list_datasets",
    "open_data",
    "register_dataset",
]

if TYPE_CHECKING:
    from ekd_jax.data.arrays import from_arrays
    from ekd_jax.data.dataset import Example, Examples, Facts, Source
    from ekd_jax.data.opening import open_data
    from ekd_jax.data.registry import list_datasets, register_dataset

_MODULES = {
    "Example": "dataset",
    "Examples": "dataset",
    "Facts": "dataset",
    "Source": "dataset",
    "from_arrays": "arrays",
    "list_datasets": "registry",
    "open_data": "opening",
    "register_dataset": "registry",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a student that predicts needs few of them."""
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(f"ekd_jax.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
