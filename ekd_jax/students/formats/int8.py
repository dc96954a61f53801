"""ONNX files that compute in 8-bit integers: ONNX Runtime's static quantization, and the choice of its settings.

Ranges of activations are calibrated on training images. Of several recipes the best is chosen on validation images;
test images only measure what it costs.
"""

import contextlib
import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.common.progress import Progress
from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.onnx_file import run_onnx
from ekd_jax.students.formats.onnx_graph import INPUT
from ekd_jax.students.formats.record import Tried
from ekd_jax.students.formats.request import QuantizationImages, in_batches


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way to quantize: weights int8, activations uint8 with a zero point.

    Attributes:
        method: how ranges of activations are calibrated, a name of ONNX Runtime's `CalibrationMethod`.
        per_channel: whether each output channel of a kernel has a scale of its own.
        ends: whether the first convolution and the classifier are quantized, too.
    """

    method: str
    per_channel: bool = True
    ends: bool = True

    def __str__(self) -> str:
        scales = "a scale per channel" if self.per_channel else "a scale per kernel"
        ends = "" if self.ends else ", first and last layer in float32"
        return f"{self.method} calibration, {scales}{ends}"


RECIPES = (
    Recipe("MinMax"),
    Recipe("Percentile"),
    Recipe("Entropy"),
    Recipe("MinMax", per_channel=False),
    Recipe("MinMax", ends=False),
)


def best_quantized(
    content: bytes, network: Exportable, images: QuantizationImages
) -> tuple[bytes, tuple[Tried, ...]]:
    """Return an ONNX file in int8, made by the recipe that is best on the validation images, and all that were tried.

    The best is that with most correct images; of equal ones, whose outputs are nearest to those of float32.

    Args:
        content: the ONNX file in float32.
        network: that it is of.
        images: to calibrate and to choose with.
    """
    validation = [network.inputs(batch) for batch in in_batches(images.validation.images)]
    expected = np.concatenate(run_onnx(content, validation))
    best, tried = b"", []
    progress = Progress("choosing a recipe for int8", len(RECIPES), unit="recipes")
    for recipe in RECIPES:
        made = quantized(
            content, [network.inputs(b) for b in in_batches(images.calibration.images)], recipe
        )
        found = np.concatenate(run_onnx(made, validation))
        correct = int((found.argmax(1) == images.validation.labels).sum())
        difference = float(np.sqrt(np.mean(np.square(found - expected))))
        tried.append(Tried(str(recipe), correct, difference))
        if min(tried, key=lambda each: (-each.correct, each.difference)) is tried[-1]:
            best = made
        progress.add(1)
    progress.finish()
    return best, tuple(sorted(tried, key=lambda each: (-each.correct, each.difference)))


def quantized(content: bytes, calibration: Sequence[np.ndarray], recipe: Recipe) -> bytes:
    """Return an ONNX file with convolutions, matrix products and what is between them in int8 (QDQ format).

    Args:
        content: the file in float32.
        calibration: batches of inputs, of one size.
        recipe: how.

    Raises:
        UserError: ONNX Runtime quantizes nothing of it.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load_from_string(content)
    products = [node.name for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        before, after = pathlib.Path(name) / "float32.onnx", pathlib.Path(name) / "int8.onnx"
        # Without shapes the quantizer warns, and does less.
        quantization.quant_pre_process(model, before, skip_optimization=True, skip_symbolic_shape=True)
        quantization.quantize_static(
            before,
            after,
            _Batches(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=recipe.per_channel,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=[] if recipe.ends else [products[0], products[-1]],
            calibrate_method=quantization.CalibrationMethod[recipe.method],
            extra_options={"CalibStridedMinMax": 1},  # batch by batch, whatever the method
        )
        made = onnx.load(after)
    if not any(node.op_type == "QuantizeLinear" for node in made.graph.node):
        raise UserError(
            "--quantize=int8: ONNX Runtime finds nothing in this network that it could quantize"
        )
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    return bytes(made.SerializeToString())


class _Batches:
    """A `CalibrationDataReader` of ONNX Runtime."""

    def __init__(self, inputs: Sequence[np.ndarray]):
        self._inputs = inputs
        self.set_range(0, len(inputs))

    def __len__(self) -> int:
        return len(self._inputs)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._inputs[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        images = next(self._left, None)
        return None if images is None else {INPUT: images}
