"""Imports of the user's modules, which register networks, methods and data sets."""

import importlib
import sys
from collections.abc import Iterable

from ekd_jax.common.errors import UserError, reason


def import_modules(modules: Iterable[str], needed_by: str = "config.imports") -> None:
    """Import the user's modules.

    A module that is not installed is looked for in the working directory, too, as `python -m` does.

    Args:
        modules: dotted names.
        needed_by: what names them, for the error.

    Raises:
        UserError: a module is missing or fails while it is imported.
    """
    for module in modules:
        if "" not in sys.path:
            sys.path.append("")
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except ModuleNotFoundError as error:
            missing = "" if error.name == module.partition(".")[0] else f" (no module {error.name!r})"
            raise UserError(
                f"{needed_by} needs the module {module!r}, which cannot be imported{missing}: install it, or put "
                f"its directory on PYTHONPATH"
            ) from error
        except Exception as error:  # the user's code may raise anything
            raise UserError(
                f"{needed_by} needs the module {module!r}, which fails: {reason(error)}"
            ) from error
