"""A graph of ONNX nodes while it is written: its constants, and what is folded into convolutions.

Nothing of the package `onnx` is needed until the graph becomes a file.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OPSET, IR_VERSION = 17, 8  # what runtimes since 2022 read
INPUT = "images"
FEWEST_SHARED = 4096  # bytes; smaller constants that are equal are kept once


@dataclasses.dataclass
class Node:
    """A node: an operation of ONNX, the names of what it reads and makes, and its attributes."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class Graph:
    """Nodes in the order in which they are computed, and constants by name."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self._shared: dict[Any, str] = {}
        self._counter = 0

    def name(self, hint: str) -> str:
        """Return a name that is not used yet."""
        self._counter += 1
        return f"{hint.lower()}_{self._counter}"

    def constant(self, array: Any, hint: str = "constant") -> str:
        """Return the name of a constant."""
        array = np.asarray(array)  # not ascontiguousarray, which gives a scalar an axis
        if array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.nbytes < FEWEST_SHARED else None
        if key is None or key not in self._shared:
            name = self.name(hint)
            self.constants[name] = array
            if key is None:
                return name
            self._shared[key] = name
        return self._shared[key]

    def integers(self, values: Sequence[int]) -> str:
        """Return the name of a constant vector of int64."""
        return self.constant(np.array(values, np.int64), "integers")

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output, and return the name of that."""
        return self.add_several(op, 1, *inputs, **attributes)[0]

    def add_several(self, op: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node, and return the names of its outputs."""
        names = [self.name(op) for _ in range(outputs)]
        self.nodes.append(Node(op, list(inputs), names, attributes))
        return names

    def fold(self, keep: str) -> None:
        """Fold every multiplication and addition that follows a convolution into it, such as batch norm.

        A convolution that something else reads, too, stays as it is. Its kernel is scaled in float64.

        Args:
            keep: name of the output of the graph.
        """
        readers = Counter(name for node in self.nodes for name in node.inputs)
        readers[keep] += 1
        made_by = {name: node for node in self.nodes for name in node.outputs}
        kept = []
        for node in self.nodes:
            if not self._folded(node, readers, made_by):
                kept.append(node)
        self.nodes = kept

    def _folded(self, node: Node, readers: Mapping[str, int], made_by: dict[str, Node]) -> bool:
        """Fold a node into the convolution before it, if there is one that nothing else reads."""
        if node.op not in ("Mul", "Add"):
            return False
        for place in (0, 1):
            source, factor = node.inputs[place], self.constants.get(node.inputs[1 - place])
            conv = made_by.get(source)
            if conv is None or conv.op != "Conv" or factor is None or readers[source] != 1:
                continue
            kernel = self.constants[conv.inputs[1]].astype(np.float64)
            if factor.size != 1 and (factor.ndim != 4 or factor.shape[1] != factor.size):
                continue  # it is not one value for each channel
            each = np.broadcast_to(factor.reshape(-1).astype(np.float64), len(kernel))
            bias = self.constants[conv.inputs[2]].astype(np.float64) if len(conv.inputs) > 2 else 0 * each
            if node.op == "Mul":
                kernel, bias = kernel * each[:, None, None, None], bias * each
            else:
                bias = bias + each
            conv.inputs[1:] = [
                self.constant(kernel.astype(np.float32), "kernel"),
                self.constant(bias.astype(np.float32), "bias"),
            ]
            conv.outputs = node.outputs
            made_by[node.outputs[0]] = conv
            return True
        return False

    def halve(self, last: str) -> str:
        """Compute in float16: constants are cast, the images when they are read, the result when it is made.

        Args:
            last: name of the result, float32.

        Returns:
            The name of the new result.

        Raises:
            OverflowError: a constant is too large for float16.
        """
        for name, array in self.constants.items():
            if array.dtype == np.float32:
                if np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
                    raise OverflowError(f"{name} has values above {np.finfo(np.float16).max:,.0f}")
                self.constants[name] = array.astype(np.float16)
        for node in self.nodes:
            if node.op == "Cast" and node.attributes["to"] == "float32":
                node.attributes["to"] = "float16"
        first = Node("Cast", [INPUT], [self.name("cast")], {"to": "float16"})
        if not (self.nodes and self.nodes[0].op == "Cast"):
            for node in self.nodes:
                node.inputs = [first.outputs[0] if name == INPUT else name for name in node.inputs]
            self.nodes.insert(0, first)
        return self.add("Cast", last, to="float32")

    def model(
        self,
        output: tuple[str, str],
        input_type: str,
        input_shape: Sequence[int],
        classes: int,
        metadata: Mapping[str, str],
    ) -> bytes:
        """Return the file: a model with the input `images` (batch, H, W, C) and one output (batch, K) float32.

        Args:
            output: its name in the graph, and in the file.
            input_type: "float32" or "uint8".
            input_shape: H, W, C.
            classes: K.
            metadata: texts by name.
        """
        import onnx
        from onnx import helper, numpy_helper

        types = {
            name: getattr(onnx.TensorProto, name) for name in ("FLOAT16", "UINT8", "INT32", "INT64", "BOOL")
        }
        types |= {"FLOAT32": onnx.TensorProto.FLOAT}
        inner, outer = output
        nodes = []
        for node in self.nodes:
            attributes = {
                key: types[value.upper()] if key == "to" else value
                for key, value in node.attributes.items()
            }
            outputs = [outer if name == inner else name for name in node.outputs]
            inputs = [outer if name == inner else name for name in node.inputs]
            nodes.append(helper.make_node(node.op, inputs, outputs, name=outputs[0], **attributes))
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "student",
            [helper.make_tensor_value_info(INPUT, types[input_type.upper()], ["batch", *input_shape])],
            [helper.make_tensor_value_info(outer, onnx.TensorProto.FLOAT, ["batch", classes])],
            [
                numpy_helper.from_array(array, name)
                for name, array in self.constants.items()
                if name in read
            ],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="ekd_jax",
            ir_version=IR_VERSION,
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString()
        return content
