"""HTML: one file that runs students in a browser, with the runtime, the networks and test images inside."""

import base64
import dataclasses
import functools
import gzip
import html
import importlib.metadata
import importlib.resources
import json
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ekd_jax.common.records import as_json
from ekd_jax.students.formats.chromium import BrowserError, chromium, find_chromium
from ekd_jax.students.formats.drawings import measure_drawings
from ekd_jax.students.formats.exportable import Exportable
from ekd_jax.students.formats.onnx_file import run_onnx, write_onnx
from ekd_jax.students.formats.onnxruntime_web import NAME, WebRuntime
from ekd_jax.version import __version__

PAGE = "student.html"
EXAMPLES = 12  # test images to click on
SCRIPTS = ("images.js", "drawing.js", "page.js")


def write_page(
    networks: Sequence[Exportable], dtype: str, images: np.ndarray, runtime: WebRuntime
) -> bytes:
    """Return a page that runs networks side by side, and loads nothing from anywhere.

    Args:
        networks: of equal classes, input and preprocessing; they give logits.
        dtype: "float32" or "float16", in which they compute.
        images: (N, H, W, C) uint8; some of them can be clicked on, and drawings are brought to their form.
        runtime: what runs the networks.
    """
    files = [write_onnx(network, dtype) for network in networks]
    examples = images[np.linspace(0, len(images) - 1, min(EXAMPLES, len(images))).astype(int)]
    drawings = measure_drawings(images)
    first = networks[0]
    facts = {
        "classes": first.class_names,
        "shape": first.input_shape,
        "mean": first.preprocessing.mean,
        "std": first.preprocessing.std,
        "crop": first.preprocessing.fit == "crop",  # as `read_image` has it
        "adaptive": resizing_is_adaptive(),
        "drawings": as_json(drawings) if drawings else None,
        "students": [_student(*each) for each in zip(networks, files, strict=True)],
    }
    packed = {
        "runtime-script": runtime.script,
        "runtime-wasm": runtime.wasm,
        "examples": np.ascontiguousarray(examples).tobytes(),
        **{f"network-{number}": file for number, file in enumerate(files)},
    }
    parts = {
        "title": html.escape(_title(first)),
        "about": html.escape(_about(networks)),
        "version": __version__,
        "runtime_version": html.escape(runtime.version),
        "style": _source("page.css"),
        "packed": "\n".join(
            f'<script type="application/octet-stream" id="packed-{name}">{_packed(content)}</script>'
            for name, content in packed.items()
        ),
        "facts": json.dumps(facts).replace("<", "\\u003c"),  # a class name may end a script
        "script": "\n".join(map(_source, SCRIPTS)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda part: parts[part[1]], _source("page.html")).encode()


def run_page(page: bytes, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the logits (S, B, K) that the page's networks give for each batch of images (B, H, W, C) uint8.

    The page is opened in a browser, where one is installed that starts. Otherwise the networks that are in the page
    are run by ONNX Runtime in Python.

    Raises:
        BrowserError: the page fails in the browser.
    """
    browser = working_browser()
    if browser is None:
        return [np.stack(each) for each in zip(*_run_in_python(page, batches), strict=True)]
    with tempfile.TemporaryDirectory() as folder, chromium(browser.path) as opened:
        file = pathlib.Path(folder) / PAGE
        file.write_bytes(page)
        opened.open(file)
        found = []
        for batch in batches:
            pixels = base64.b64encode(np.ascontiguousarray(batch).tobytes()).decode()
            logits = opened.evaluate(f"ekd.logits('{pixels}')")
            found.append(np.array(logits, np.float32).reshape(len(logits), len(batch), -1))
        return found


def what_runs(runtime: WebRuntime) -> str:
    """Return by what `run_page` runs a page, with versions, for the record."""
    browser = working_browser()
    if browser is None:
        version = importlib.metadata.version("onnxruntime")
        return f"onnxruntime {version} in Python (no Chromium was found to open the page with {NAME} {runtime.version})"
    return f"{NAME} {runtime.version} in {browser.version}"


@dataclasses.dataclass(frozen=True)
class Browser:
    """An installed Chromium: where it is, and its version."""

    path: str
    version: str


@functools.cache
def working_browser() -> Browser | None:
    """Return a Chromium that is installed and starts, None if there is none."""
    path = find_chromium()
    if path is None:
        return None
    try:
        with chromium(path) as opened:
            return Browser(path, opened.version)
    except (
        BrowserError,
        OSError,
    ):  # a wrapper of a package that is not there, a container without its rights
        return None


def _run_in_python(page: bytes, batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Return what ONNX Runtime computes from each network in a page, for each batch."""
    facts = facts_of(page)
    mean, std = (np.array(facts[name], np.float32) for name in ("mean", "std"))
    inputs = [(batch.astype(np.float32) / np.float32(255) - mean) / std for batch in batches]
    return [
        run_onnx(unpacked(page, f"network-{number}"), inputs) for number in range(len(facts["students"]))
    ]


def facts_of(page: bytes) -> dict[str, Any]:
    """Return what a page knows about its networks."""
    facts: dict[str, Any] = json.loads(_element(page, "facts"))
    return facts


def unpacked(page: bytes, name: str) -> bytes:
    """Return what a page has under a name: `runtime-script`, `runtime-wasm`, `network-0`, ..., `examples`."""
    return gzip.decompress(base64.b64decode(_element(page, f"packed-{name}")))


def resizing_is_adaptive() -> bool:
    """Return whether Pillow, when it resizes, begins with the columns of some images: versions round differently."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 9), dtype=np.uint8))
    rows_first = image.resize((8, 90), Image.Resampling.BILINEAR).resize((8, 40), Image.Resampling.BILINEAR)
    return rows_first.tobytes() != image.resize((8, 40), Image.Resampling.BILINEAR).tobytes()


def _element(page: bytes, name: str) -> bytes:
    start = page.index(b">", page.index(f' id="{name}">'.encode())) + 1
    return page[start : page.index(b"</script>", start)]


@functools.lru_cache(2)  # the runtime takes a second
def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _source(name: str) -> str:
    return (importlib.resources.files(__package__) / "page" / name).read_text().strip()


def _title(network: Exportable) -> str:
    provenance = network.about.get("provenance", {})
    model = provenance.get("model") or network.about.get("network", {}).get("name") or "A network"
    return f"{model} on {provenance['data']}" if provenance.get("data") else str(model)


def _about(networks: Sequence[Exportable]) -> str:
    number, classes = len(networks), len(networks[0].class_names)
    answer = (
        "A network answers, and runs" if number == 1 else f"{number} networks answer side by side, and run"
    )
    return (
        f"Which of {classes:,} classes is in the image? {answer} in this browser: nothing is sent anywhere, and the "
        f"page works offline."
    )


def _student(network: Exportable, file: bytes) -> dict[str, Any]:
    about = network.about
    parameters, metrics = about.get("parameters"), about.get("metrics", {})
    return {
        "name": network.name[0].upper() + network.name[1:],
        "kind": _kind(about.get("network", {})),
        "parameters": int(parameters) if parameters else None,
        "bytes": len(file),
        "top1": metrics.get("top1"),
        "evaluated_on": about.get("evaluated_on", ""),
    }


def _kind(network: dict[str, Any]) -> str:
    """Return network and width in words: "resnet8, width 3/5"."""
    widths = dict.fromkeys(network.get("widths", ()))
    return ", ".join(filter(None, (network.get("name", ""), f"width {' '.join(widths)}" if widths else "")))
