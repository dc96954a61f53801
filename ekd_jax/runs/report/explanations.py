"""The section on Grad-CAM: how alike students see an image, together and alone, and maps of some images."""

from collections.abc import Mapping, Sequence

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.common.progress import Progress
from ekd_jax.common.spread import spread
from ekd_jax.models.ensemble import Student
from ekd_jax.runs.report.document import (
    NO_RESULT,
    Missing,
    Part,
    Picture,
    Pictures,
    Table,
    heading,
    picture,
)
from ekd_jax.runs.report.gradcam import activation_maps, similarity
from ekd_jax.runs.report.predictions import Answers, read_images
from ekd_jax.runs.report.reading import BASELINE, Alone
from ekd_jax.runs.run import Run

EXPLAINED, COMPARED = 6, 256  # images whose maps are shown, and on which maps are compared
FIRST = "student 1"

Maps = dict[str, np.ndarray]  # network -> (N, H, W)
Scores = dict[str, np.ndarray]  # network -> similarity of its map to that of student 1, (N,)


def explanations(
    number: int, own: Answers, alone: Mapping[str, Alone], others: Mapping[str, Answers]
) -> list[Part]:
    """Return the similarities of a group, over all of its runs, and maps of its first run.

    Args:
        number: of the group, for names of files.
        own: the group's answers.
        alone: the same networks trained alone, by the name of the group's student. A run is compared with the one of
            its seed, or with the first if there is none.
        others: not needed.
    """
    if own.group.method == BASELINE or len(own.group.run.description.students) < 2:
        return []
    assert own.data is not None
    labels = own.first.labels
    places = np.linspace(0, len(labels) - 1, min(COMPARED, len(labels))).astype(int)
    each: list[Scores] = []
    shown: Maps = {}
    networks: dict[str, Student] = {}
    progress = Progress(f"Grad-CAM of {own.group.label}", len(own.runs), unit="runs")
    try:
        images = read_images(own.data, [int(p) for p in places], labels)
        for run in own.runs:
            maps = _maps(run, alone, images, labels[places], networks)
            each.append({name: similarity(maps[FIRST], found) for name, found in maps.items()})
            shown = shown or maps
            progress.add(1)
    except UserError as error:
        return [Missing(own.named, str(error))]
    finally:
        progress.clear()
    parts: list[Part] = [_similarities(own, each, bool(alone))]
    parts.append(_pictures(number, own, shown, each[0], images, labels[places]))
    if not alone:
        reason = "no run of the method baseline has the same networks and epochs"
        parts.append(Missing("Grad-CAM of baseline students", reason))
    return parts


def _maps(
    run: Run,
    alone: Mapping[str, Alone],
    images: np.ndarray,
    labels: np.ndarray,
    networks: dict[str, Student],
) -> Maps:
    """Return the maps of a run's students, and of those trained alone with its seed, or else of the first.

    `networks` collects them by name, so that those of further seeds need not be compiled again.
    """
    students = {f"student {s.student}": run.student(s.student) for s in run.description.students}
    for name, beside in alone.items():
        number = int(beside.row.predictor.removeprefix("student_"))
        runs = {each.run.config.seed: each.run for each in beside.group.runs}
        its = runs.get(run.config.seed, beside.group.run).student(number)
        if its.input_shape == images.shape[1:]:
            students[f"{heading(name)} alone"] = its
    return {
        name: activation_maps(student, images, labels, networks.setdefault(name, student.network))
        for name, student in students.items()
    }


def _similarities(own: Answers, each: Sequence[Scores], has_alone: bool) -> Table:
    header = ["", "in this run", "images", *["alone", "images"] * has_alone]
    rows = []
    for name in [name for name in each[0] if name != FIRST and not name.endswith(" alone")]:
        cells = [name, *_mean(each, name)]
        cells += _mean(each, f"{name} alone") if has_alone else []
        rows.append(tuple(cells))
    caption = (
        f"{own.named}: Grad-CAM, similarity to student 1, the pseudo teacher: mean Pearson correlation over test "
        f"images whose two maps are not constant"
    )
    return Table(caption, tuple(header), tuple(rows))


def _mean(each: Sequence[Scores], name: str) -> list[str]:
    """Return the mean similarity of a network, spread over the seeds, and from how many images of all seeds."""
    found = [scores[name][~np.isnan(scores[name])] for scores in each if name in scores]
    images = sum(len(scores[name]) for scores in each if name in scores)
    means = [float(values.mean()) for values in found if len(values)]
    text = f"{spread(means):.3f}" if means else NO_RESULT
    return [text, f"{sum(map(len, found)):,} of {images:,}" if images else ""]


def _pictures(
    number: int, own: Answers, maps: Maps, scores: Scores, images: np.ndarray, labels: np.ndarray
) -> Pictures:
    last = f"student {len(own.group.run.description.students)}"
    shown = [name for name in (FIRST, "student 2", last, f"{last} alone") if name in maps]
    chosen = np.linspace(0, len(images) - 1, min(EXPLAINED, len(images))).astype(int)
    names = own.group.run.description.class_names
    texts = [names[labels[i]] for i in chosen]
    plain = [
        picture(images[i], text, f"test image of class {text}")
        for i, text in zip(chosen, texts, strict=True)
    ]
    rows: list[tuple[str, tuple[Picture, ...]]] = [("image", tuple(plain))]
    for name in dict.fromkeys(shown):
        laid = [
            picture(
                images[i], _score(scores[name][i]), f"Grad-CAM of {name} for class {text}", maps[name][i]
            )
            for i, text in zip(chosen, texts, strict=True)
        ]
        rows.append((name, tuple(laid)))
    text = "Grad-CAM for the class of the image; below, the correlation with the map of student 1"
    return Pictures(f"gradcam-{number}", f"{own.first_named}: {text}", tuple(texts), tuple(rows))


def _score(value: float) -> str:
    return "constant" if np.isnan(value) else f"{value:.2f}"
