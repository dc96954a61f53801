"""Ways to train students, one file each. A new one is its file and its line here."""

from ekd_jax.methods.base import Method
from ekd_jax.methods.baseline import Baseline
from ekd_jax.methods.blockwise import Blockwise, BlockwiseSearch
from ekd_jax.methods.byot import Byot
from ekd_jax.methods.cl_ilr import ClIlr
from ekd_jax.methods.dckd import Dckd
from ekd_jax.methods.dml import Dml
from ekd_jax.methods.ekd import Ekd
from ekd_jax.methods.ffl import Ffl
from ekd_jax.methods.kd import Kd
from ekd_jax.methods.kdcl import Kdcl
from ekd_jax.methods.meal import Meal, MealV2
from ekd_jax.methods.oem import Oem
from ekd_jax.methods.okddip import Okddip
from ekd_jax.methods.one import One
from ekd_jax.methods.pcl import Pcl
from ekd_jax.methods.self_distillation import EnsembleDistillation, SelfDistillation
from ekd_jax.methods.snapshot import Snapshot
from ekd_jax.methods.srm import Srm, SrmDictionaries, SrmInitialize

METHODS: dict[str, type[Method]] = {
    "oem": Oem,
    "baseline": Baseline,
    "dml": Dml,
    "kd": Kd,
    "blockwise": Blockwise,
    "blockwise_search": BlockwiseSearch,
    "self_distillation": SelfDistillation,
    "ensemble_distillation": EnsembleDistillation,
    "snapshot": Snapshot,
    "one": One,
    "okddip": Okddip,
    "cl_ilr": ClIlr,
    "kdcl": Kdcl,
    "ffl": Ffl,
    "pcl": Pcl,
    "byot": Byot,
    "ekd": Ekd,
    "dckd": Dckd,
    "meal": Meal,
    "meal_v2": MealV2,
    "srm": Srm,
    "srm_dictionaries": SrmDictionaries,
    "srm_initialize": SrmInitialize,
}
