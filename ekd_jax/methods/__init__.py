"""Ways to train students, one file each. A new one is its file and its line here."""

from ekd_jax.methods.base import Method
from ekd_jax.methods.baseline import Baseline
from ekd_jax.methods.dml import Dml
from ekd_jax.methods.kd import Kd
from ekd_jax.methods.oem import Oem

METHODS: dict[str, type[Method]] = {
    "oem": Oem,
    "baseline": Baseline,
    "dml": Dml,
    "kd": Kd,
}
