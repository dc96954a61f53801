"""Knowledge distillation by sparse representation matching.

Three runs, one after the other: `SRMDictionaries` learns dictionaries of a teacher's feature maps; in
`SRMInitialize` a student learns to predict the teacher's sparse codes; and `SRM` distills the teacher's
logits into that student.

References:
    Tran, Gabbouj, Iosifidis, "Knowledge Distillation By Sparse Representation Matching", 2021, arXiv
    2103.17012; official code viebboy/SRM, cifar100/code/Layers.py, Utility.py, Runners.py
    (docs/reference/srm.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ekd_jax.common.errors import UserError
from ekd_jax.common.knob import NOT_NEGATIVE, POSITIVE, one_of
from ekd_jax.methods import losses
from ekd_jax.methods.base import Batch, Method, Terms, knob, per_student
from ekd_jax.methods.distilling import WithTeachers
from ekd_jax.methods.kd import KD
from ekd_jax.models.ensemble import Outputs
from ekd_jax.models.initializers import uniform

Array = jax.Array
Weights = Mapping[str, Array]
LABELS = one_of(("global-local", "global", "local"))
DICTIONARIES, INITIALIZE = "dictionaries", "initialize"  # names of the earlier runs

LABELS_MEANING = "Which labels students learn from: the global one, local ones, or both."
SPARSITY_MEANING = (
    "Share of the K entries of a code that are kept, at least one entry (.01, .02 or .03 in the paper)."
)
MULTIPLIER_MEANING = "Number of codewords per channel, K / D (1.5, 2 or 3 on CIFAR-100, 4 on ImageNet)."


class Codewords(nn.Module):
    """A dictionary for feature maps of D channels: W (D, K), whose columns are codewords, and a number b."""

    number: int

    @nn.compact
    def __call__(self, channels: int) -> Weights:
        """Return W as "centers" and b as "bias"."""
        centers = uniform(math.sqrt(6 / self.number))  # PyTorch's kaiming_uniform_ of a (D, K) matrix
        return {
            "centers": self.param("centers", centers, (channels, self.number), jnp.float32),
            "bias": self.param("bias", uniform(1.0), (1,), jnp.float32),
        }


class Dictionaries(nn.Module):
    """A dictionary per feature map, with `multiplier` times as many codewords as the map has channels."""

    multiplier: float

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> list[Weights]:
        """Return the dictionary of each map."""
        channels = [x.shape[-1] for x in maps]
        sizes = [max(1, int(self.multiplier * d)) for d in channels]
        found = enumerate(zip(sizes, channels, strict=True), 1)
        return [Codewords(size, name=f"stage{i}")(d) for i, (size, d) in found]


class SimilarityLayers(nn.Module):
    """A dictionary per feature map and student, with as many codewords as the teacher's."""

    @nn.compact
    def __call__(self, features: Sequence[Sequence[Array]], sizes: Sequence[int]) -> list[list[Array]]:
        """Return the similarities `[b][s]`, (B, H, W, K_b).

        Args:
            features: `features[b][s]`, feature map of block b of student s.
            sizes: K_b for each block.
        """

        def layer(b: int, s: int, x: Array) -> Array:
            return similarity(x, Codewords(sizes[b - 1], name=f"student{s}_stage{b}")(x.shape[-1]))

        return [[layer(b, s, x) for s, x in enumerate(row, 1)] for b, row in enumerate(features, 1)]


def similarity(x: Array, codewords: Weights) -> Array:
    """Return how similar each pixel is to each codeword.

        k = sigmoid(W^T x + b)

    Args:
        x: (B, H, W, D).
        codewords: "centers" W (D, K) and "bias" b (1,).

    Returns:
        (B, H, W, K), in float32 or wider.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.sigmoid(x @ codewords["centers"] + codewords["bias"])


def sparsify(k: Array, share: float) -> Array:
    """Return k with all but the largest max(1, int(share K)) entries of each pixel set to 0.

    Entries that equal the smallest one to keep are all kept, as in the official code.
    """
    kept = max(1, int(share * k.shape[-1]))
    least = lax.top_k(lax.stop_gradient(k), kept)[0][..., -1:]
    return jnp.where(k >= least, k, 0)


def binary_cross_entropy(p: Array, target: Array) -> Array:
    """Return the binary cross entropy of probabilities, as PyTorch's nn.BCELoss.

        -[t log p + (1 - t) log(1 - p)]

    Args:
        p: probabilities.
        target: t, shares from 0 to 1 of the same shape.

    Returns:
        A scalar, the mean over all elements; finite for p = 0 or 1, too.
    """
    least = jnp.finfo(p.dtype).tiny
    log_p, log_other = (jnp.log(jnp.maximum(v, least)) for v in (p, 1 - p))
    return -(target * log_p + (1 - target) * log_other).mean()


def check_map_sizes(student: Sequence[Array], teacher: Sequence[Array]) -> None:
    """Raise UserError unless the student's feature maps are as high and wide as the teacher's last ones.

    Args:
        student: feature maps (B, H, W, C) of the stages, or their shapes and dtypes.
        teacher: those of the teacher, which may have more stages.
    """

    def sizes(maps: Sequence[Array]) -> str:
        return ", ".join(f"{x.shape[1]}x{x.shape[2]}" for x in maps)

    last = teacher[len(teacher) - len(student) :] if len(teacher) >= len(student) else ()
    if not last or any(a.shape[1:3] != b.shape[1:3] for a, b in zip(student, last, strict=True)):
        raise UserError(
            f"method.teachers: the teacher's feature maps are {sizes(teacher) or 'none'}, the student's "
            f"{sizes(student)}: they must agree in height and width, counted from the last"
        )


class SRMDictionaries(Method):
    """The first run of SRM: dictionaries of the feature maps of student 1.

        L = sum over maps x of MSE(x, W code(x)),    code(x) = sparsify(sigmoid(W^T x + b))

    The network is the teacher, named by `model.initial_weights`. It stays as it is, in evaluation mode (the
    official code leaves its batch norm in training mode here); only the dictionaries learn.
    """

    sharing = "none"
    trains_networks = False
    part_of = "srm"

    codeword_multiplier: float = knob(2.0, MULTIPLIER_MEANING, POSITIVE)
    sparsity_multiplier: float = knob(0.02, SPARSITY_MEANING, POSITIVE)

    def setup(self) -> None:
        self.dictionaries = Dictionaries(self.codeword_multiplier)

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        maps = [row[0] for row in outputs.features]
        terms: Terms = {}
        for b, (x, codewords) in enumerate(zip(maps, self.dictionaries(maps), strict=True), 1):
            k = sparsify(similarity(x, codewords), self.sparsity_multiplier)
            error = losses.mean_squared_error(x, k @ codewords["centers"].T)
            terms[f"student_1/loss_reconstruction_block{b}"] = error
        loss = jnp.stack(list(terms.values())).sum()
        return loss, {"student_1/loss_reconstruction": loss, **terms}


class SRMInitialize(WithTeachers):
    """The second run of SRM: students that learn to predict the teacher's sparse codes.

        L = sum over students and maps of BCE(mean of k over pixels, global label) + CE(k, local label)

    k is the output of the student's own similarity layer on its map. Of the teacher's sparse codes, the
    mean over pixels is the global label, and the index of the largest entry at each pixel the local one.
    The student's k is not sparse, and CE takes these sigmoids as logits. A student that has fewer maps than
    the teacher is compared with the last of them.

    The one teacher is the directory of a finished run of `SRMDictionaries`. There is no KD loss.
    """

    sharing = "none"
    uses_teacher_maps = True
    part_of = "srm"

    labels: str = knob("global-local", LABELS_MEANING, LABELS)
    sparsity_multiplier: float = knob(0.02, SPARSITY_MEANING, POSITIVE)

    def setup(self) -> None:
        self.similarity_layers = SimilarityLayers()

    def __call__(self, outputs: Outputs, batch: Batch) -> tuple[Array, Terms]:
        codes = self._codes(outputs, batch)
        predicted = self.similarity_layers(outputs.features, [code.shape[-1] for code in codes])
        terms: Terms = {}
        if "global" in self.labels:
            terms |= _sums_over_maps("loss_global", global_loss, predicted, codes)
        if "local" in self.labels:
            terms |= _sums_over_maps("loss_local", local_loss, predicted, codes)
        return jnp.stack(list(terms.values())).sum(), terms

    def _codes(self, outputs: Outputs, batch: Batch) -> list[Array]:
        """Return the teacher's sparse codes, of as many maps as the students have."""
        (teacher, *others) = batch.teachers
        learned = teacher.method.get("dictionaries", {})
        if others or not learned:
            raise UserError(
                "method.teachers: srm_initialize needs the directory of one finished run of srm_dictionaries"
            )
        maps = {f"stage{i}": x for i, x in enumerate(teacher.maps, 1)}
        for s in range(len(outputs.pooled)):
            check_map_sizes([row[s] for row in outputs.features], teacher.maps)
        names = list(maps)[-len(outputs.features) :]
        codes = [sparsify(similarity(maps[n], learned[n]), self.sparsity_multiplier) for n in names]
        return lax.stop_gradient(codes)


def _sums_over_maps(
    term: str,
    loss: Callable[[Array, Array], Array],
    predicted: list[list[Array]],
    codes: list[Array],
) -> Terms:
    """Return the sum of each student's losses over its maps, as terms."""
    rows = [[loss(k, code) for k in row] for row, code in zip(predicted, codes, strict=True)]
    return per_student(term, [sum(column) for column in zip(*rows, strict=True)])


def global_loss(k: Array, code: Array) -> Array:
    """Return the binary cross entropy of means over pixels.

        BCE(mean_pixels k, mean_pixels code)

    Args:
        k: similarities of a student, (B, H, W, K).
        code: sparse codes of the teacher, (B, H, W, K).

    Returns:
        A scalar, the mean over batch and codewords.
    """
    return binary_cross_entropy(k.mean((1, 2)), code.mean((1, 2)))


def local_loss(k: Array, code: Array) -> Array:
    """Return the cross entropy of the codeword that is most similar to each pixel.

        -log softmax(k)_argmax(code)

    Args:
        k: similarities of a student, (B, H, W, K), taken as logits.
        code: sparse codes of the teacher, (B, H, W, K).

    Returns:
        A scalar, the mean over batch and pixels.
    """
    return losses.cross_entropy(k.reshape(-1, k.shape[-1]), code.argmax(-1).ravel())


class SRM(KD):
    """Sparse representation matching in three runs (Tran, Gabbouj, Iosifidis 2021).

        L = ce_weight CE(z) + kd_weight T^2 KL(z_teacher || z)    in the last run

    One student learns from one teacher, a single network: the directory of a student, or `RUN:1`. Both must
    have feature maps of the same height and width. The earlier runs, in `earlier/dictionaries` and
    `earlier/initialize` of the run's directory, are those of `SRMDictionaries` and `SRMInitialize`. They
    use Adam, whose rate drops to a tenth after 10 and 70 % of the first, and after 19 and 81 % of the
    second (10/60/30 and 30/100/30 epochs in the paper). They name each other's directories in full, so a
    run must not be moved before it is complete.

    The last run is trained as `config.optimizer` and `config.train` say; in the paper with Adam, 1e-3 ->
    1e-4 -> 1e-5 for 30/100/70 epochs, weight decay 1e-4 and batches of 128. ce_weight and kd_weight are 1 -
    alpha and alpha in the paper, which chooses alpha of .25, .5 and .75 and T of 2, 4 and 8 by validation.
    Without the teacher's logits ("SRM w/o T") they are 1 and 0.
    """

    ce_weight: float = 0.5
    kd_weight: float = 0.5
    labels: str = knob("global-local", LABELS_MEANING, LABELS)
    codeword_multiplier: float = knob(2.0, MULTIPLIER_MEANING, POSITIVE)
    sparsity_multiplier: float = knob(0.02, SPARSITY_MEANING, POSITIVE)
    dictionary_epochs: float = knob(100.0, "Epochs of the first run.", POSITIVE)
    dictionary_learning_rate: float = knob(1e-3, "Initial learning rate of the first run.", POSITIVE)
    dictionary_batch_size: int = knob(
        0, "Batch size of the first run, 512 in the official code; 0: train.batch_size.", NOT_NEGATIVE
    )
    initialize_epochs: float = knob(160.0, "Epochs of the second run.", POSITIVE)
    initialize_learning_rate: float = knob(1e-3, "Initial learning rate of the second run.", POSITIVE)
    initialize_batch_size: int = knob(
        0, "Batch size of the second run, 384 in the official code; 0: train.batch_size.", NOT_NEGATIVE
    )
    initialize_weight_decay: float = knob(1e-4, "Weight decay of the second run.", NOT_NEGATIVE)
