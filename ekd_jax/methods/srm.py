"""Knowledge distillation by sparse representation matching (SRM).

Tran, Gabbouj, Iosifidis 2021 (arXiv 2103.17012); official code viebboy/SRM, cifar100/code/Layers.py,
Utility.py, Runners.py (METHODS.md 8).

Three stages, each a run: dictionaries of the teacher's maps (`SrmDictionaries`); a student that learns to
predict the teacher's sparse codes (`SrmInitialize`); and knowledge distillation of that student (`Srm`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.methods import losses
from ekd_jax.methods.base import (
    Batch,
    Method,
    Terms,
    check_above,
    check_choice,
    check_not_negative,
    per_student,
)
from ekd_jax.methods.distilling import Taught
from ekd_jax.methods.kd import Kd
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import uniform

Array = jax.Array
Weights = Mapping[str, Array]
LABELS = ("global-local", "global", "local")
DICTIONARIES, INITIALIZE = "dictionaries", "initialize"


class Codewords(nn.Module):
    """W (D, K), whose columns are the codewords, and one number b, for maps of D channels."""

    number: int

    @nn.compact
    def __call__(self, channels: int) -> Weights:
        centers = uniform(math.sqrt(6 / self.number))  # PyTorch's kaiming_uniform_ of a (D, K) matrix
        return {
            "centers": self.param("centers", centers, (channels, self.number), jnp.float32),
            "bias": self.param("bias", uniform(1.0), (1,), jnp.float32),
        }


class Dictionaries(nn.Module):
    """Of each map its codewords, so many times as many as it has channels."""

    multiplier: float

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> list[Weights]:
        channels = [x.shape[-1] for x in maps]
        sizes = [max(1, int(self.multiplier * d)) for d in channels]
        found = enumerate(zip(sizes, channels, strict=True), 1)
        return [Codewords(size, name=f"stage{i}")(d) for i, (size, d) in found]


class SimilarityLayers(nn.Module):
    """Of each map of each student, features[b][s], codewords of its own, as many as the teacher's."""

    @nn.compact
    def __call__(self, features: Sequence[Sequence[Array]], sizes: Sequence[int]) -> list[list[Array]]:
        """k (B, H, W, K), as features."""

        def layer(b: int, s: int, x: Array) -> Array:
            return similarity(x, Codewords(sizes[b - 1], name=f"student{s}_stage{b}")(x.shape[-1]))

        return [[layer(b, s, x) for s, x in enumerate(row, 1)] for b, row in enumerate(features, 1)]


def similarity(x: Array, codewords: Weights) -> Array:
    """k = sigmoid(W^T x + b) at every pixel: (B, H, W, D) -> (B, H, W, K), in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.sigmoid(x @ codewords["centers"] + codewords["bias"])


def sparse(k: Array, share: float) -> Array:
    """k with all but the greatest max(1, int(share * K)) of every pixel set to 0; of equal ones at the
    edge all stay, as in the official code."""
    kept = max(1, int(share * k.shape[-1]))
    least = lax.top_k(lax.stop_gradient(k), kept)[0][..., -1:]
    return jnp.where(k >= least, k, 0)


def binary_cross_entropy(p: Array, target: Array) -> Array:
    """-[t log p + (1 - t) log(1 - p)], mean over all elements (nn.BCELoss); finite for p = 0 or 1."""
    least = jnp.finfo(p.dtype).tiny
    log_p, log_other = (jnp.log(jnp.maximum(v, least)) for v in (p, 1 - p))
    return -(target * log_p + (1 - target) * log_other).mean()


def check_sizes(student: Sequence[Any], teacher: Sequence[Any]) -> None:
    """Raises UserError unless as many maps, or their shapes, from the last are of the same height and
    width; the teacher may have more."""

    def sizes(maps: Sequence[Any]) -> str:
        return ", ".join(f"{x.shape[1]}x{x.shape[2]}" for x in maps)

    last = teacher[len(teacher) - len(student) :] if len(teacher) >= len(student) else ()
    if not last or any(a.shape[1:3] != b.shape[1:3] for a, b in zip(student, last, strict=True)):
        raise UserError(
            f"method.teachers: the teacher's maps are {sizes(teacher) or 'none'}, the student's "
            f"{sizes(student)}: they must agree in height and width, from the last on"
        )


class SrmDictionaries(Method):
    """The first stage: L = sum over maps x of student 1 of MSE(x, W k), k being sparse codes of x.

    k is sigmoid(W^T x + b) at every pixel with all but its greatest entries set to 0. The network is the
    teacher, given by `model.initial_weights`, in evaluation mode (the official code leaves its batch norm
    in training mode here); the dictionaries alone learn.

    Attributes:
        codeword_multiplier: K / D (1.5, 2 or 3 on CIFAR-100, 4 on ImageNet).
        sparsity_multiplier: the share of the K entries that is kept, at least one (.01, .02 or .03).
    """

    sharing = "none"
    trains_networks = False

    codeword_multiplier: float = 2.0
    sparsity_multiplier: float = 0.02

    def __post_init__(self) -> None:
        check_above(self, "codeword_multiplier", "sparsity_multiplier")
        super().__post_init__()

    def setup(self) -> None:
        self.dictionaries = Dictionaries(self.codeword_multiplier)

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        maps = [row[0] for row in outputs.features]
        terms: Terms = {}
        for b, (x, codewords) in enumerate(zip(maps, self.dictionaries(maps), strict=True), 1):
            k = sparse(similarity(x, codewords), self.sparsity_multiplier)
            error = losses.mean_squared_error(x, k @ codewords["centers"].T)
            terms[f"student_1/loss_reconstruction_block{b}"] = error
        loss = jnp.stack(list(terms.values())).sum()
        return loss, {"student_1/loss_reconstruction": loss, **terms}


class SrmInitialize(Taught):
    """The second stage: L = sum over students and maps of BCE(mean of k over pixels, global label)
    + CE(k, local label), k being the student's own similarity layer on its map.

    Of the teacher's sparse codes the mean over pixels is the global label, and at every pixel the number of
    the greatest entry the local one. The student's k is not sparse, and in CE its sigmoids are the logits.
    A student that has fewer maps than the teacher is compared with the last of them.

    Attributes:
        labels: which terms there are: "global-local", "global" or "local".
        sparsity_multiplier: as of `SrmDictionaries`.

    The one teacher is the folder of a finished run of `SrmDictionaries`. No KD loss is taken here.
    """

    sharing = "none"
    uses_teacher_maps = True

    labels: str = "global-local"
    sparsity_multiplier: float = 0.02

    def __post_init__(self) -> None:
        check_choice(self, "labels", LABELS)
        check_above(self, "sparsity_multiplier")
        super().__post_init__()

    def setup(self) -> None:
        self.similarity_layers = SimilarityLayers()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        codes = self._codes(outputs, batch)
        predicted = self.similarity_layers(outputs.features, [code.shape[-1] for code in codes])
        terms: Terms = {}
        if "global" in self.labels:
            terms |= self._summed("loss_global", global_loss, predicted, codes)
        if "local" in self.labels:
            terms |= self._summed("loss_local", local_loss, predicted, codes)
        return jnp.stack(list(terms.values())).sum(), terms

    def _codes(self, outputs: Outputs, batch: Batch) -> list[Array]:
        """The teacher's sparse codes, of as many maps as students have."""
        (teacher, *others) = batch.teachers
        learned = teacher.method.get("dictionaries", {})
        if others or not learned:
            raise UserError(
                "method.teachers: srm_initialize wants the folder of one finished run of srm_dictionaries"
            )
        maps = {f"stage{i}": x for i, x in enumerate(teacher.maps, 1)}
        for s in range(len(outputs.pooled)):
            check_sizes([row[s] for row in outputs.features], teacher.maps)
        names = list(maps)[-len(outputs.features) :]
        codes = [sparse(similarity(maps[n], learned[n]), self.sparsity_multiplier) for n in names]
        return lax.stop_gradient(codes)

    def _summed(self, term: str, loss: Any, predicted: list[list[Array]], codes: list[Array]) -> Terms:
        """Of each student the sum of its losses over maps."""
        rows = [[loss(k, code) for k in row] for row, code in zip(predicted, codes, strict=True)]
        return per_student(term, [sum(column) for column in zip(*rows, strict=True)])


def global_loss(k: Array, code: Array) -> Array:
    """BCE of the means over pixels."""
    return binary_cross_entropy(k.mean((1, 2)), code.mean((1, 2)))


def local_loss(k: Array, code: Array) -> Array:
    """Cross entropy at every pixel with the greatest entry of its code, mean over batch and pixels."""
    return losses.cross_entropy(k.reshape(-1, k.shape[-1]), code.argmax(-1).ravel())


class Srm(Kd):
    """All three stages; the last is L = ce_weight * CE + kd_weight * T^2 KL(teacher || student).

    It trains one student, from one teacher that is a single network: the folder of a student, or `RUN:1`.
    Both must have maps of the same height and width. The first stages are runs in `earlier/dictionaries`
    and `earlier/initialize` of the run's folder, with Adam, whose rate drops to a tenth after 10 and 70 %
    and after 19 and 81 % of them (10/60/30 and 30/100/30 epochs in the paper). They name each other's
    folders in full: a run must not be moved before it is complete.

    The last stage is trained as `config.optimizer` and `config.train` say: in the paper with Adam, 1e-3 ->
    1e-4 -> 1e-5 for 30/100/70 epochs, weight decay 1e-4, batches of 128. Without teacher logits ("SRM w/o
    T") it is kd_weight=0, ce_weight=1.

    Attributes:
        ce_weight, kd_weight: 1 - alpha and alpha (paper: of .25, .5 and .75 the best on validation; T of 2,
            4 and 8).
        labels, codeword_multiplier, sparsity_multiplier: as of `SrmInitialize` and `SrmDictionaries`.
        dictionary_epochs, dictionary_learning_rate: of the first stage.
        initialize_epochs, initialize_learning_rate, initialize_weight_decay: of the second.
        dictionary_batch_size, initialize_batch_size: 0: `train.batch_size` (official code: 512 and 384).
    """

    ce_weight: float = 0.5
    kd_weight: float = 0.5
    labels: str = "global-local"
    codeword_multiplier: float = 2.0
    sparsity_multiplier: float = 0.02
    dictionary_epochs: float = 100.0
    dictionary_learning_rate: float = 1e-3
    dictionary_batch_size: int = 0
    initialize_epochs: float = 160.0
    initialize_learning_rate: float = 1e-3
    initialize_batch_size: int = 0
    initialize_weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_choice(self, "labels", LABELS)
        check_above(self, "codeword_multiplier", "sparsity_multiplier")
        for stage in ("dictionary", "initialize"):
            check_above(self, f"{stage}_epochs", f"{stage}_learning_rate")
            check_not_negative(self, f"{stage}_batch_size")
        check_not_negative(self, "initialize_weight_decay")
        super().__post_init__()
