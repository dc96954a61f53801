"""OpenVINO: its intermediate representation, two files made of the ONNX file."""

import importlib
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

TELEMETRY = "openvino_telemetry"
XML, BIN = "student.xml", "student.bin"


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would start a process and report to its makers."""
    before = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[TELEMETRY]
        if before is not None:
            sys.modules[TELEMETRY] = before


def write_openvino(onnx_file: bytes) -> dict[str, bytes]:
    """Return the two files of OpenVINO's representation of an ONNX file, by name."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = openvino.Core().read_model(onnx_file, b"")
        openvino.save_model(model, folder / XML, compress_to_fp16=False)
        return {file: (folder / file).read_bytes() for file in (XML, BIN)}


def run_openvino(files: dict[str, bytes], batches: list[np.ndarray]) -> list[np.ndarray]:
    """Return what OpenVINO computes on batches of images, on a CPU."""
    openvino = import_openvino()
    core = openvino.Core()
    model = core.read_model(files[XML], files[BIN])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(compiled({0: images})[0]) for images in batches]
