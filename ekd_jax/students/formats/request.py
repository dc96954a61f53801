"""A request to export: networks, options, and the images that files are compared and made with."""

import dataclasses
import os
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.onnxruntime_web import WebRuntime, find_onnxruntime_web

DTYPES = ("float32", "float16")
LARGE_BATCH = 7  # images that a runtime is given at once, after one alone
MEASURED_BATCH = 16  # images at a time where many are measured


@dataclasses.dataclass(frozen=True)
class Options:
    """The choices of a user about exported files.

    Attributes:
        dtype: in which they compute, one of `DTYPES`; "float16" for ONNX, OpenVINO and pages.
        library: of a PyTorch state dict, whose names the arrays get: "torchvision", "timm", "EfficientNet-PyTorch",
            "RepDistiller" or "official".
        torch_network: what makes the network where that library is no package: "module:function(arguments)".
        quantize: "int8" for ONNX and OpenVINO, or "" to compute in `dtype`.
        max_loss: how many points of top-1 that may cost.
        with_resizing: the file takes images of any size; for ONNX, with preprocessing inside.
        onnxruntime_web: directory of that npm package, for pages; None for the usual one.
    """

    dtype: str = DTYPES[0]
    library: str = ""
    torch_network: str = ""
    quantize: str = ""
    max_loss: float = 1.0
    with_resizing: bool = False
    onnxruntime_web: str | os.PathLike[str] | None = None


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Images and what they show.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,) integers.
        name: what they are, for people: "training images of cifar10".
    """

    images: np.ndarray
    labels: np.ndarray
    name: str

    def __str__(self) -> str:
        return f"{len(self.images):,} {self.name}"


@dataclasses.dataclass(frozen=True)
class QuantizationImages:
    """The images that a quantized network is made, chosen and measured with; they do not overlap."""

    calibration: Labeled
    validation: Labeled
    test: Labeled


@dataclasses.dataclass(frozen=True)
class Request:
    """Networks to be exported, with options and images.

    Attributes:
        networks: one, or several of equal classes, input and preprocessing.
        images: (N, H, W, C) uint8, on which files are compared with JAX; none to write alone.
        options: what the user chose.
        quantization: images to make and to measure int8 with, which `options.quantize` needs.
        originals: images (H', W', C) uint8 of other sizes, which `options.with_resizing` needs.
    """

    networks: tuple[Exportable, ...]
    images: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0, 0, 0), np.uint8))
    options: Options = Options()
    quantization: QuantizationImages | None = None
    originals: Sequence[np.ndarray] = ()

    @property
    def network(self) -> Exportable:
        """The first network, or the only one."""
        return self.networks[0]

    @property
    def batches(self) -> list[np.ndarray]:
        """The images, one alone and then `LARGE_BATCH` at a time."""
        return [self.images[:1], *in_batches(self.images[1:], LARGE_BATCH)]

    @cached_property
    def web_runtime(self) -> WebRuntime:
        """onnxruntime-web, read from its directory; UserError where it is missing."""
        return find_onnxruntime_web(self.options.onnxruntime_web)

    @property
    def inputs(self) -> list[np.ndarray]:
        """The batches as a file takes them."""
        return [self.network.inputs(batch) for batch in self.batches]


def in_batches(images: np.ndarray, size: int = MEASURED_BATCH) -> list[np.ndarray]:
    """Return images in batches of this size, the last of which may be smaller."""
    return [images[i : i + size] for i in range(0, len(images), size)]
