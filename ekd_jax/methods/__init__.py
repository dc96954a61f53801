"""Ways to train students, one file each. A new one is its file and its line here."""

from ekd_jax.methods.base import Method
from ekd_jax.methods.baseline import Baseline
from ekd_jax.methods.blockwise import Blockwise, BlockwiseSearch
from ekd_jax.methods.dml import Dml
from ekd_jax.methods.kd import Kd
from ekd_jax.methods.oem import Oem
from ekd_jax.methods.self_distillation import EnsembleDistillation, SelfDistillation
from ekd_jax.methods.snapshot import Snapshot

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
}
