"""ONNX: the program of a network's evaluation, written node by node."""

import json

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.students.formats import onnx_rules, onnx_shapes  # noqa: F401  they register their rules
from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.onnx_graph import INPUT
from ekd_jax.students.formats.onnx_writer import Tensor, UnsupportedError, Writer


class UnwritableError(UserError):
    """A network has an operation that ONNX, or this writer, does not know."""


def write_onnx(network: Exportable, dtype: str = "float32") -> bytes:
    """Return an ONNX file (opset 17) that computes what the network computes, for any number of images.

    Constants are folded, and batch norm where it follows a convolution.

    Args:
        network: what is exported.
        dtype: "float32" or "float16", in which it computes.

    Raises:
        UnwritableError: the network has an operation that ONNX, or this writer, does not know.
    """
    program = network.trace()
    rank = len(network.input_shape) + 1
    writer = Writer()
    images = Tensor(INPUT, tuple(range(rank)), program.in_avals[0].shape)
    try:
        (logits,) = writer.run(program.jaxpr, [np.asarray(c) for c in program.consts], [images])
        last = writer.stored(logits, (0, 1))
        if network.with_preprocessing:
            last = writer.graph.add("Softmax", last, axis=-1)
        writer.graph.fold(last)
        if dtype == "float16":
            last = writer.graph.halve(last)
    except (UnsupportedError, OverflowError) as error:
        raise UnwritableError(f"{network.name} cannot be written as ONNX: {error}") from error
    return writer.graph.model(
        (last, network.output),
        network.input_type,
        network.input_shape,
        len(network.class_names),
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in network.metadata().items()
        },
    )


def run_onnx(content: bytes, batches: list[np.ndarray]) -> list[np.ndarray]:
    """Return what ONNX Runtime computes on batches of images, on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(None, {INPUT: images})[0]) for images in batches]
