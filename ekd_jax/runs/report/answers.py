"""The sections of a report that need the test images: calibration, agreement, classes, disputed images, Grad-CAM."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.common.log import logger
from ekd_jax.data.opening import Data
from ekd_jax.runs.report.charts import heat_map, reliability
from ekd_jax.runs.report.document import (
    NO_RESULT,
    Figures,
    Missing,
    Part,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    heading,
    picture,
)
from ekd_jax.runs.report.gradcam import activation_maps, similarity
from ekd_jax.runs.report.predictions import Predictions, predict_all, read_images, test_data
from ekd_jax.runs.report.reading import BASELINE, Alone, Group, baselines
from ekd_jax.runs.report.shapes import Figure
from ekd_jax.runs.report.statistics import (
    BINS,
    calibration,
    confusion,
    diversity,
    most_disputed,
    recall_by_class,
)

DISPUTED, EXPLAINED, COMPARED = 8, 6, 256  # images that are shown, and on which Grad-CAM maps are compared
FIRST = "student 1"
MATRIX = 25  # more classes are a list
LISTED = 20
NOT_ASKED = "the test images were not to be read (--nopredictions)"


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of the first run of a group, and its data; or why there are none.

    Attributes:
        group: whose run it is.
        given: the answers; None if the data or the checkpoint is missing.
        data: the test images.
        reason: why there are no answers.
    """

    group: Group
    given: Predictions | None = None
    data: Data | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """The group's label, and which of its runs it is if it has several."""
        several = len(self.group.runs) > 1
        return f"{self.group.label}, seed {self.group.first.seed}" if several else self.group.label


def ask(groups: Sequence[Group]) -> list[Answers]:
    """Predict all test images by the first run of every group; what cannot be had has a reason."""
    found = []
    for group in groups:
        try:
            data = test_data(group.run)
            found.append(Answers(group, predict_all(group.run, data), data))
        except UserError as error:
            logger.warning(f"{group.label}: no predictions: {error}")
            found.append(Answers(group, reason=str(error)))
    return found


def not_asked(groups: Sequence[Group]) -> list[Answers]:
    """Return no answers, because they were not asked for."""
    return [Answers(group, reason=NOT_ASKED) for group in groups]


def answer_sections(asked: Sequence[Answers], groups: Sequence[Group]) -> list[Section]:
    """Return all sections that need the test images."""
    if all(each.given is None for each in asked):
        reasons = dict.fromkeys(each.reason for each in asked)
        what = "Calibration, agreement, classes, disputed images, Grad-CAM"
        return [Section("answers", "Test images", tuple(Missing(what, reason) for reason in reasons))]
    makers = [
        ("calibration", "Calibration", _calibration),
        ("agreement", "Agreement of the students", _agreement),
        ("classes", "Classes", _classes),
        ("disputed", "Images that students disagree on", _disputed),
        ("gradcam", "Grad-CAM", _gradcam),
    ]
    by_label = {each.group.label: each for each in asked}
    sections = []
    for key, title, make in makers:
        parts: list[Part] = []
        for number, each in enumerate(asked, 1):
            if each.given is None:
                parts.append(Missing(each.group.label, each.reason))
            else:
                parts += make(number, each, each.given, baselines(each.group, groups), by_label)
        if not parts:
            parts.append(Missing(title, "no run has several students that were trained together"))
        sections.append(Section(key, title, tuple(parts)))
    return sections


Others = Mapping[str, Answers]
AloneOf = Mapping[str, Alone]


def _calibration(number: int, own: Answers, given: Predictions, _: AloneOf, __: Others) -> list[Part]:
    each = [calibration(c, right) for c, right in zip(given.confidence, given.correct, strict=True)]
    sure = given.confidence.mean(-1)
    rows = tuple(
        (heading(name), f"{100 * right.mean():.2f}", f"{100 * s:.2f}", f"{c.ece:.2f}")
        for name, right, s, c in zip(given.names, given.correct, sure, each, strict=True)
    )
    caption = (
        f"{own.name}, {len(given.labels):,} test images: calibration error (ECE) with {BINS} bins, per cent"
    )
    figures = [
        reliability(
            f"reliability-{number}-{given.names[place]}",
            f"Reliability of {heading(given.names[place])}, ECE {each[place].ece:.2f}",
            each[place].confidence,
            each[place].accuracy,
            each[place].counts,
            each[place].ece,
        )
        for place in _extremes(own, given)
    ]
    note = "Bars: accuracy in each bin of confidence, pale with fewer than 10 images; dashed: perfect calibration."
    table = Table(caption, ("", "top-1", "mean confidence", "ECE"), rows)
    return [table, Figures("", tuple(figures)), *([Text(note)] if number == 1 else [])]


def _extremes(own: Answers, given: Predictions) -> list[int]:
    """Return the places of the first student, the last one, and the ensemble."""
    last = len(own.group.run.description.students)
    names = ["student_1", f"student_{last}", *(["ensemble"] if last > 1 else [])]
    return [given.names.index(name) for name in dict.fromkeys(names) if name in given.names]


def _students(given: Predictions) -> list[int]:
    return [place for place, name in enumerate(given.names) if name.startswith("student_")]


def _agreement(number: int, own: Answers, given: Predictions, _: AloneOf, __: Others) -> list[Part]:
    places = _students(given)
    if len(places) < 2:
        return []
    names = [heading(given.names[p]).removeprefix("student ") for p in places]
    found = diversity(given.predicted[places], given.labels)
    facts = (
        ("mean disagreement of two students", f"{found.disagreement:.2f}"),
        ("images that all students have right", f"{found.all_right:.2f}"),
        ("images that all students have wrong", f"{found.all_wrong:.2f}"),
    )
    pair = ("student", "student")
    agreement = heat_map(
        f"agreement-{number}", "Agreement: same class, per cent", found.agreement, names, names, 1, pair
    )
    errors = heat_map(
        f"errors-{number}",
        "Correlation of errors",
        found.error_correlation,
        names,
        names,
        2,
        pair,
        limits=(0.0, 1.0),
    )
    return [
        Table(f"{own.name}, per cent of the test images", ("", "per cent"), facts),
        Figures("", (agreement, errors)),
    ]


def _classes(number: int, own: Answers, given: Predictions, alone: AloneOf, others: Others) -> list[Part]:
    names = own.group.run.description.class_names
    recall = recall_by_class(given.predicted, given.labels, len(names))
    figures: list[Figure] = []
    parts: list[Part] = []
    students = _students(given)
    columns, gains = [], []
    for place in students:
        name = given.names[place]
        beside = alone.get(name)
        its = others[beside.group.label].given if beside else None
        if its and beside:
            before = recall_by_class(its.predicted, its.labels, len(names))[
                its.names.index(beside.row.predictor)
            ]
        elif not alone and place != students[0]:
            before = recall[students[0]]
        else:
            continue
        columns.append(heading(name).removeprefix("student "))
        gains.append(recall[place] - before)
    against = "the same network trained alone" if alone else "student 1"
    if gains and len(names) <= MATRIX:
        key, title = f"gains-{number}", f"Gain in recall over {against}, points"
        figures.append(
            heat_map(key, title, np.stack(gains, -1), names, columns, 1, ("class", "student"), signed=True)
        )
    elif gains:
        parts.append(_largest_gains(own, names, columns, np.stack(gains, -1), against))
    for place in _extremes(own, given)[1:] or _extremes(own, given):
        counts = confusion(given.predicted[place], given.labels, len(names))
        title = f"Confusion of {heading(given.names[place])}, images"
        if len(names) <= MATRIX:
            key, axes = f"confusion-{number}-{given.names[place]}", ("class", "answer")
            figures.append(
                heat_map(key, title, counts.astype(float), names, names, 0, axes, hide_zero=True)
            )
        else:
            parts.append(_most_confused(f"{own.name}: {title}", names, counts))
    return [*([Figures(own.name, tuple(figures))] if figures else []), *parts]


def _largest_gains(
    own: Answers, names: Sequence[str], columns: Sequence[str], gains: np.ndarray, against: str
) -> Table:
    mean = np.nanmean(gains, -1)
    order = [i for i in np.argsort(-mean) if not np.isnan(mean[i])]
    shown = order if len(order) <= LISTED else [*order[: LISTED // 2], *order[-LISTED // 2 :]]
    rows = tuple((names[i], *(f"{gain:+.1f}" for gain in gains[i])) for i in shown)
    caption = (
        f"{own.name}: gain in recall over {against}, points; classes with the largest gains and losses"
    )
    return Table(caption, ("class", *(f"student {name}" for name in columns)), rows)


def _most_confused(caption: str, names: Sequence[str], counts: np.ndarray) -> Table:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None)[:LISTED]]
    rows = tuple(
        (names[i], names[j], f"{wrong[i, j]:,}", f"{counts[i].sum():,}") for i, j in order if wrong[i, j]
    )
    return Table(f"{caption}: most frequent mistakes", ("class", "answer", "images", "of"), rows)


def _disputed(number: int, own: Answers, given: Predictions, _: AloneOf, __: Others) -> list[Part]:
    students = _students(given)
    if len(students) < 2:
        return []
    names = own.group.run.description.class_names
    places = most_disputed(given.predicted[students], given.labels, DISPUTED)
    if not places:
        return [Missing(own.name, "its students agree on every test image")]
    assert own.data is not None
    try:
        images = read_images(own.data, places, given.labels)
    except UserError as error:
        return [Missing(own.name, str(error))]
    rows = []
    for image, place in zip(images, places, strict=True):
        answers = tuple(names[given.predicted[p, place]] for p in range(len(given.names)))
        rows.append((image, names[given.labels[place]], answers, place))
    pictures = tuple(
        picture(image, f"{label}", f"test image {place}, class {label}") for image, label, _, place in rows
    )
    table = Table(
        f"{own.name}: what each network takes them for",
        ("image, class", *map(heading, given.names)),
        tuple((f"{place}, {label}", *answers) for _, label, answers, place in rows),
    )
    header = tuple(f"image {place}" for *_, place in rows)
    return [
        Pictures(f"disputed-{number}", f"{own.name}: images and their classes", header, (("", pictures),)),
        table,
    ]


def _gradcam(number: int, own: Answers, given: Predictions, alone: AloneOf, _: Others) -> list[Part]:
    group = own.group
    if group.method == BASELINE or len(group.run.description.students) < 2:
        return []
    assert own.data is not None
    places = np.linspace(0, len(given.labels) - 1, min(COMPARED, len(given.labels))).astype(int)
    try:
        images = read_images(own.data, [int(p) for p in places], given.labels)
        labels = given.labels[places]
        maps = {FIRST: activation_maps(group.run.student(1), images, labels)}
        for student in range(2, len(group.run.description.students) + 1):
            maps[f"student {student}"] = activation_maps(group.run.student(student), images, labels)
        for name, beside in alone.items():
            its = beside.group.run.student(int(beside.row.predictor.removeprefix("student_")))
            if its.input_shape == images.shape[1:]:
                maps[f"{heading(name)} alone"] = activation_maps(its, images, labels)
    except UserError as error:
        return [Missing(own.name, str(error))]
    scores = {name: similarity(maps[FIRST], each) for name, each in maps.items()}
    parts: list[Part] = [_similarities(own, scores, bool(alone))]
    last = f"student {len(group.run.description.students)}"
    shown = [name for name in (FIRST, "student 2", last, f"{last} alone") if name in maps]
    chosen = np.linspace(0, len(images) - 1, min(EXPLAINED, len(images))).astype(int)
    names = group.run.description.class_names
    rows: list[tuple[str, tuple[Picture, ...]]] = []
    label_texts = [names[labels[i]] for i in chosen]
    plain = [
        picture(images[i], text, f"test image of class {text}")
        for i, text in zip(chosen, label_texts, strict=True)
    ]
    rows.append(("image", tuple(plain)))
    for name in dict.fromkeys(shown):
        laid = [
            picture(
                images[i], _score(scores[name][i]), f"Grad-CAM of {name} for class {text}", maps[name][i]
            )
            for i, text in zip(chosen, label_texts, strict=True)
        ]
        rows.append((name, tuple(laid)))
    caption = (
        f"{own.name}: Grad-CAM for the class of the image; below, the correlation with the map of student 1"
    )
    parts.append(Pictures(f"gradcam-{number}", caption, tuple(label_texts), tuple(rows)))
    if not alone:
        parts.append(
            Missing(
                "Grad-CAM of baseline students",
                "no run of the method baseline has the same networks and epochs",
            )
        )
    return parts


def _score(value: float) -> str:
    return "constant" if np.isnan(value) else f"{value:.2f}"


def _similarities(own: Answers, scores: Mapping[str, np.ndarray], has_alone: bool) -> Table:
    header = ["", "in this run", "images", *["alone", "images"] * has_alone]
    rows = []
    for name in [name for name in scores if name != FIRST and not name.endswith(" alone")]:
        cells = [name, *_mean(scores[name])]
        if has_alone:
            cells += _mean(scores[f"{name} alone"]) if f"{name} alone" in scores else ["", ""]
        rows.append(tuple(cells))
    caption = (
        f"{own.name}: Grad-CAM, similarity to student 1, the pseudo teacher: mean Pearson correlation over test images "
        f"whose two maps are not constant"
    )
    return Table(caption, tuple(header), tuple(rows))


def _mean(values: np.ndarray) -> list[str]:
    there = values[~np.isnan(values)]
    return [f"{there.mean():.3f}" if len(there) else NO_RESULT, f"{len(there)} of {len(values)}"]
