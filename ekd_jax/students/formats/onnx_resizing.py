"""Resizing inside an ONNX file: it takes images of any size and brings them to the network's as `data.fit` says."""

from typing import Any

import numpy as np

from ekd_jax.data.decode import EVALUATION_MARGIN
from ekd_jax.students.formats.onnx_graph import INPUT

OPSET = 18  # the first whose Resize has an antialiased filter
RESIZED = "resized"


def with_resizing(content: bytes, shape: tuple[int, int, int], fit: str) -> bytes:
    """Return an ONNX file that takes images (batch, height, width, C) uint8 of any height and width.

    It computes what `data.decode.Reader` does, with Pillow's antialiased bilinear filter.

    Args:
        content: a file that takes images (batch, H, W, C) uint8.
        shape: H, W, C.
        fit: "crop" resizes the short side and takes the center, everything else resizes the whole image.
    """
    import onnx
    from onnx import helper, numpy_helper, version_converter

    model = onnx.load_from_string(content)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    model = version_converter.convert_version(model, OPSET)
    graph = model.graph
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(value: object, dtype: type = np.int64) -> str:
        name = f"resizing_constant_{len(constants)}"
        constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def add(op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"resizing_{op.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def resize(sizes: str, output: str = "") -> str:
        return add(
            "Resize",
            INPUT,
            "",
            "",
            sizes,
            output=output,
            mode="linear",
            axes=[1, 2],
            antialias=1,
            exclude_outside=1,  # weights of pixels beyond the edge go to the others, as in Pillow
        )

    size = list(shape[:2])
    if fit == "crop":  # as `data.decode.center_crop`
        short = constant([round(min(size) * EVALUATION_MARGIN)])
        height, width = (add("Shape", INPUT, start=axis, end=axis + 1) for axis in (1, 2))
        is_wide = add("LessOrEqual", height, width)
        tall = add("Where", is_wide, short, add("Div", add("Mul", short, height), width))
        wide = add("Where", is_wide, add("Div", add("Mul", short, width), height), short)
        sizes = add("Concat", tall, wide, axis=0)
        whole, beyond = resize(sizes), add("Sub", sizes, constant(size))
        half = add("Mul", add("Cast", beyond, to=onnx.TensorProto.FLOAT), constant([0.5], np.float32))
        first = add("Cast", add("Round", half), to=onnx.TensorProto.INT64)
        last = add("Add", first, constant(size))
        add("Slice", whole, first, last, constant([1, 2]), output=RESIZED)
    else:
        resize(constant(size), RESIZED)
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == INPUT:
                node.input[place] = RESIZED
    for node in reversed(nodes):
        graph.node.insert(0, node)
    graph.initializer.extend(constants)
    _, tall, wide, _ = graph.input[0].type.tensor_type.shape.dim
    tall.dim_param, wide.dim_param = "height", "width"
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    resized: bytes = model.SerializeToString()
    return resized
