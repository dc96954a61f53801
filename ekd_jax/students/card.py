"""The model card of a student: what it is, how it was trained and measured, what it costs, and how to load it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ekd_jax.data.licenses import license_of
from ekd_jax.students.description import Preprocessing, StudentDescription
from ekd_jax.students.torch_names import PACKAGES, libraries

NAMES_SHOWN = 20  # classes that the card names if they were not measured one by one
CLASSES_SHOWN = 100  # rows of the table of classes


def model_card(own: StudentDescription, megabytes: float) -> str:
    """Return the model card of a student in Markdown.

    Args:
        own: everything about it.
        megabytes: size of its weights.
    """
    sections = {
        "Results": _results(own),
        "Cost": _table(
            ["parameters", "multiply-accumulates for one image", "weights"],
            [[f"{own.parameters:,}", f"{own.macs:,}", f"{megabytes:.2f} MB"]],
        ),
        "Input and output": _interface(own),
        "How to load it": _loading(own),
        "Training": _training(own),
        "Data": _data(own),
        "Files": _table(
            ["file", "SHA-256"],
            [
                ["`weights.safetensors`", f"`{own.weights_sha256}`"],
                ["`student.json`", "has the digest of the weights; everything on this page is from it"],
            ],
        ),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"# {_title(own)}\n\n{_summary(own)}\n\n{body}\n"


LOADING = """Copy this directory; it stands alone. `pip install ekd_jax`, then on a command line:

```
ekd predict --student_dir=. --image=photo.jpg
```

in Python:

```python
import ekd_jax

student = ekd_jax.load_student(".")
probabilities = student.predict(images)  # uint8 (batch, {size}) -> (batch, {classes})
```

and where this package is not wanted, as a file that is compared with JAX before it is written, for ONNX Runtime, for
OpenVINO{torch} and for JAX alone:

```
ekd export --student_dir=. --format=onnx,openvino,stablehlo --with_preprocessing --output=exported
{torch_command}```

The first of them then runs so:

```python
import onnxruntime

session = onnxruntime.InferenceSession("exported/student.onnx")
(probabilities,) = session.run(None, {{"images": images}})
```"""


def _title(own: StudentDescription) -> str:
    network, widths = own.network, list(dict.fromkeys(own.network.widths))
    if widths == ["1"]:
        return f"{network.name} for {own.provenance.data}"
    width = widths[0] if len(widths) == 1 else ", ".join(network.widths)
    plural = "s, stage by stage," if len(widths) > 1 else ""
    return f"{network.name} at width{plural} {width} for {own.provenance.data}"


def _summary(own: StudentDescription) -> str:
    height, width, channels = own.network.input_shape
    colors = "gray" if channels == 1 else "color"
    text = f"A classifier of {colors} images of {height} x {width} pixels into {own.network.num_classes} classes."
    origin = own.provenance
    if origin.converted_from:
        return f"{text} Its weights are those of the PyTorch file `{origin.converted_from}`."
    return (
        f"{text} It is student {own.student} of a run of ekd_jax, which trains a family of networks together. "
        f"The method is `{origin.method}`: {origin.method_summary}"
    )


def _results(own: StudentDescription) -> str:
    if not own.metrics:
        return "It was not evaluated: `ekd evaluate --student_dir=. --per_class` does."
    origin = own.provenance
    when = f"at step {origin.step:,} of {origin.steps:,}"
    if origin.step == origin.steps:
        when = f"after the last of {origin.epochs:g} epochs (step {origin.step:,})"
    images = (
        f"{own.examples:,} {own.evaluated_on} images" if own.examples else f"the {own.evaluated_on} images"
    )
    names = {"top1": "top-1", "top5": "top-5", "nll": "negative log likelihood"}
    units = {"nll": "nats"}
    shown = {names.get(k, k): f"{v:.4g} {units.get(k, '%')}" for k, v in own.metrics.items()}
    text = f"On {images}, {when}, one seed ({origin.seed}):\n\n" + _table(
        list(shown), [list(shown.values())]
    )
    if own.by_class:
        worst = sorted(own.by_class.items(), key=lambda item: item[1].f1)[:CLASSES_SHOWN]
        shown_classes = worst if len(own.by_class) > CLASSES_SHOWN else own.by_class.items()
        rows = [
            [_cell(name), f"{c.images:,}", f"{c.recall:.2f}", f"{c.precision:.2f}", f"{c.f1:.2f}"]
            for name, c in shown_classes
        ]
        few = f" (the {CLASSES_SHOWN} worst of {len(own.by_class):,}; `student.json` has all)"
        tested = sum(scores.images for scores in own.by_class.values())
        right = sum(scores.images * scores.recall for scores in own.by_class.values()) / tested
        text += f"\n\nBy class, of {tested:,} test images, of which {right:.2f} % are right"
        text += f"{few * (len(own.by_class) > CLASSES_SHOWN)}:\n\n"
        text += _table(["class", "images", "recall %", "precision %", "F1 %"], rows)
    else:
        text += (
            "\n\n`ekd evaluate --student_dir=. --per_class` prints recall, precision and F1 of every class."
        )
    return f"{text}\n\nOther images than these were not tried. Probabilities are those of a softmax, not calibrated."


def _interface(own: StudentDescription) -> str:
    rows = [
        ["input", f"images, uint8 (batch, {_by(own.network.input_shape)}), channels last"],
        ["resizing", _resizing(own.preprocessing)],
        ["normalization", _normalization(own.preprocessing)],
        ["output", f"probabilities (batch, {own.network.num_classes}), or logits before the softmax"],
    ]
    text = _table(["", ""], rows)
    if not own.by_class:
        names = ", ".join(map(_cell, own.class_names[:NAMES_SHOWN]))
        more = len(own.class_names) - NAMES_SHOWN
        text += f"\n\nClasses, in the order of the output: {names}" + (
            f" and {more:,} more." if more > 0 else "."
        )
    return text


def _training(own: StudentDescription) -> str:
    origin = own.provenance
    if origin.converted_from:
        return ""
    start = origin.settings.get("model.initial_weights")
    text = (
        f"ekd_jax {origin.version}, seed {origin.seed}, {origin.epochs:g} epochs of {origin.train_examples:,} "
        f"training images, from {f'the weights in `{start}`' if start else 'random initial values'}. The fingerprint "
        f"of everything that changes the result is `{origin.fingerprint}`."
    )
    if not origin.settings:
        return f"{text} All settings are the defaults of that version."
    rows = [[f"`{name}`", f"`{json.dumps(value)}`"] for name, value in sorted(origin.settings.items())]
    return f"{text} Settings that are not the defaults of that version:\n\n" + _table(
        ["setting", "value"], rows
    )


def _data(own: StudentDescription) -> str:
    return f"{own.provenance.data}. License of the data: {license_of(own.provenance.data)}."


def _loading(own: StudentDescription) -> str:
    found = list(libraries(own.network.name))
    command = ""
    if found:
        library = ([name for name in found if name in PACKAGES] or found[:1])[-1]
        network = "" if library in PACKAGES else " --torch_network=MODULE:FUNCTION"
        command = f"ekd export --student_dir=. --format=torch --library={library}{network} --output=exported_torch\n"
    return LOADING.format(
        size=_by(own.network.input_shape),
        classes=own.network.num_classes,
        torch=", for PyTorch" * bool(found),
        torch_command=command,
    )


def _resizing(own: Preprocessing) -> str:
    how = {
        "native": "none: images have that size",
        "stretch": "the whole image to that size, bilinearly",
        "crop": "the middle of the image to that size, bilinearly",
    }
    return how[own.fit]


def _normalization(own: Preprocessing) -> str:
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (own.mean, own.std))
    return f"{own.formula} with mean {mean} and std {std}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return text that neither ends a cell of a table nor formats anything."""
    for character in "\\`*_|<>[]":
        text = text.replace(character, f"\\{character}")
    return text


def _by(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
