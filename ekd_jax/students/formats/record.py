"""The record of an export, and the comparison of what a runtime gives with what JAX gives."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# The largest difference from JAX, as a share of the standard deviation, over images, of what the network gives.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2}
RESIZED = 3e-2  # the same of an image that the file resizes: pixels may differ from Pillow's by 1 of 255


@dataclasses.dataclass(frozen=True)
class Tried:
    """A recipe of int8 on the validation images.

    Attributes:
        recipe: what was tried, for people.
        correct: images that it classifies rightly.
        difference: root of the mean squared difference of its outputs from those in float32.
    """

    recipe: str
    correct: int
    difference: float


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The accuracy and size of files in 8-bit integers, beside float32.

    Attributes:
        tried: all recipes on the validation images, the one that was taken first.
        calibrated_on, chosen_on, measured_on: numbers and names of images.
        images: how many were measured on.
        correct: how many of these are classified rightly.
        correct_in_float32: how many are in float32.
        bytes_in_float32: size of the files in float32.
        latency_ms: median time of a call with one image, on one thread; see `timing.Measurement`.
        latency_ms_in_float32: the same in float32; both took turns.
    """

    tried: tuple[Tried, ...]
    calibrated_on: str
    chosen_on: str
    measured_on: str
    images: int
    correct: int
    correct_in_float32: int
    bytes_in_float32: int
    latency_ms: float = 0.0
    latency_ms_in_float32: float = 0.0

    @property
    def loss(self) -> float:
        """Points of top-1 that are lost."""
        return 100 * (self.correct_in_float32 - self.correct) / self.images


@dataclasses.dataclass(frozen=True)
class Resizing:
    """How a file that resizes compares with the same file after Pillow has resized.

    Attributes:
        fit: how it resizes, as `Preprocessing.fit`.
        images: how many images of other sizes it was compared on.
        difference: the largest difference, as a share of the standard deviation.
        same_class: images in the same class.
    """

    fit: str
    images: int
    difference: float
    same_class: int


@dataclasses.dataclass(frozen=True)
class Exported:
    """A network in a format, and how it was compared with JAX.

    Attributes:
        format: a key of `FORMATS`.
        network: which one; a file may hold several.
        dtype: in which it computes; int8 is compared by accuracy, not by difference.
        layout: of the images that it takes, "NHWC" or "NCHW".
        runtime: name and version of what ran it.
        images: how many it was compared on, one alone and then `LARGE_BATCH` at a time.
        difference: the largest difference from JAX, as a share of the standard deviation.
        same_class: images that it takes for the same class as JAX.
        files: names of its files.
        sha256: of each file, hexadecimal.
        bytes: of all its files.
        quantization: what int8 costs; None of other files.
        resizing: how well it resizes; None of other files.
    """

    format: str
    network: str
    dtype: str
    layout: str
    runtime: str
    images: int
    difference: float
    same_class: int
    files: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    bytes: int = 0
    quantization: Quantization | None = None
    resizing: Resizing | None = None

    def with_files(self, files: Mapping[str, Any]) -> "Exported":
        """Return the record with what its files are."""
        return dataclasses.replace(
            self,
            files=tuple(files),
            sha256=tuple(hashlib.sha256(content).hexdigest() for content in files.values()),
            bytes=sum(map(len, files.values())),
        )


@dataclasses.dataclass(frozen=True)
class ExportRecord:
    """The record of an export; `export.json`.

    Attributes:
        network: what was exported.
        facts: what each file says about itself: classes, input, output, preprocessing, provenance; of several networks,
            what differs is in `networks`.
        compared_on: where the images are from.
        exported: the files.
    """

    network: str
    facts: dict[str, Any]
    compared_on: str
    exported: tuple[Exported, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Outputs of a runtime for images, beside the expected ones; both (N, K).

    Attributes:
        found: what it gives.
        expected: what it should give.
    """

    found: np.ndarray
    expected: np.ndarray

    @property
    def deviation(self) -> float:
        """The standard deviation over images; a bias that all of them share would hide differences."""
        expected = self.expected
        return float(np.sqrt(expected.var(0).mean())) or float(expected.std()) or 1.0

    @property
    def difference(self) -> float:
        """The largest difference, as a share of the deviation."""
        return float(np.abs(self.found - self.expected).max()) / self.deviation

    @property
    def same_class(self) -> int:
        """The number of images in the same class."""
        return int((self.found.argmax(1) == self.expected.argmax(1)).sum())

    def in_other_classes(self, tolerance: float) -> int:
        """Return how many images are in another class. Of classes as good as equal, rounding chooses one."""
        chosen = np.take_along_axis(self.expected, self.found.argmax(1)[:, None], 1)[:, 0]
        return int((self.expected.max(1) - chosen > 2 * tolerance * self.deviation).sum())

    def problem(self, tolerance: float) -> str:
        """Return in what they differ by more than rounding, "" if in nothing."""
        others = self.in_other_classes(tolerance)
        if self.difference <= tolerance and not others:  # False if it is not a number
            return ""
        return (
            f"up to {self.difference:.2g} of the standard deviation (at most {tolerance:g} is rounding), another class "
            f"for {others} of {len(self.found)} images; nothing was written"
        )
