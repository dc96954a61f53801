"""Methods: ways to train students together, one file each."""

import dataclasses
import fnmatch

from ekd_jax.common.errors import UserError
from ekd_jax.methods.base import Method, knobs_of
from ekd_jax.methods.baseline import Baseline
from ekd_jax.methods.blockwise import Blockwise, BlockwiseSearch
from ekd_jax.methods.byot import BYOT
from ekd_jax.methods.cl_ilr import CLILR
from ekd_jax.methods.dckd import DCKD
from ekd_jax.methods.dml import DML
from ekd_jax.methods.ekd import EKD
from ekd_jax.methods.ffl import FFL
from ekd_jax.methods.kd import KD
from ekd_jax.methods.kdcl import KDCL
from ekd_jax.methods.meal import MEAL, MEALV2
from ekd_jax.methods.oem import OEM
from ekd_jax.methods.okddip import OKDDip
from ekd_jax.methods.one import ONE
from ekd_jax.methods.pcl import PCL
from ekd_jax.methods.self_distillation import EnsembleDistillation, SelfDistillation
from ekd_jax.methods.snapshot import Snapshot
from ekd_jax.methods.srm import SRM, SRMDictionaries, SRMInitialize

METHODS: dict[str, type[Method]] = {
    "oem": OEM,
    "baseline": Baseline,
    "dml": DML,
    "kd": KD,
    "blockwise": Blockwise,
    "blockwise_search": BlockwiseSearch,
    "self_distillation": SelfDistillation,
    "ensemble_distillation": EnsembleDistillation,
    "snapshot": Snapshot,
    "one": ONE,
    "okddip": OKDDip,
    "cl_ilr": CLILR,
    "kdcl": KDCL,
    "ffl": FFL,
    "pcl": PCL,
    "byot": BYOT,
    "ekd": EKD,
    "dckd": DCKD,
    "meal": MEAL,
    "meal_v2": MEALV2,
    "srm": SRM,
    "srm_dictionaries": SRMDictionaries,
    "srm_initialize": SRMInitialize,
}


def register_method(name: str, method: type[Method]) -> None:
    """Add a method, so that configurations can name it: `config.method.name = name`.

    Raises:
        UserError: the name is taken, the class is no subclass of `Method`, or a field has no default.
    """
    if name in METHODS:
        raise UserError(
            f"there is a method {name!r} already, {METHODS[name].__name__}; choose another name"
        )
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"method {name!r}: {method!r} must be a subclass of ekd_jax.methods.base.Method")
    for field, knob in knobs_of(method).items():
        if knob.default is dataclasses.MISSING:
            raise UserError(f"method {name!r}: its field {field!r} must have a default, as every knob has")
    METHODS[name] = method


def list_methods(pattern: str = "*") -> list[str]:
    """Return the names of all methods that match a shell-style pattern, in alphabetical order.

    Methods that only train earlier runs of another one (`Method.part_of`) are left out.
    """
    return fnmatch.filter(sorted(name for name, method in METHODS.items() if not method.part_of), pattern)
