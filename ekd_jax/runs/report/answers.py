"""The sections of a report that need the test images. Numbers are means over the seeds; pictures are of the first."""

from collections.abc import Mapping, Sequence

import numpy as np

from ekd_jax.common.errors import UserError
from ekd_jax.common.spread import spread
from ekd_jax.runs.report.charts import heat_map, reliability
from ekd_jax.runs.report.document import (
    Figures,
    Missing,
    Part,
    Pictures,
    Section,
    Table,
    Text,
    heading,
    picture,
)
from ekd_jax.runs.report.explanations import explanations
from ekd_jax.runs.report.predictions import Answers, Predictions, read_images
from ekd_jax.runs.report.reading import Alone, Group, baselines
from ekd_jax.runs.report.shapes import Figure
from ekd_jax.runs.report.statistics import (
    BINS,
    calibration,
    confusion,
    diversity,
    most_disputed,
    recall_by_class,
)

DISPUTED = 8  # images that are shown
MATRIX = 25  # more classes are a list
LISTED = 20


def answer_sections(asked: Sequence[Answers], groups: Sequence[Group]) -> list[Section]:
    """Return all sections that need the test images."""
    if not any(own.each for own in asked):
        reasons = dict.fromkeys(reason for own in asked for reason in own.reasons)
        what = "Calibration, agreement, classes, disputed images, Grad-CAM"
        return [Section("answers", "Test images", tuple(Missing(what, reason) for reason in reasons))]
    makers = [
        ("calibration", "Calibration", _calibration),
        ("agreement", "Agreement of the students", _agreement),
        ("classes", "Classes", _classes),
        ("disputed", "Images that students disagree on", _disputed),
        ("gradcam", "Grad-CAM", explanations),
    ]
    by_label = {own.group.label: own for own in asked}
    sections = []
    for key, title, make in makers:
        parts: list[Part] = []
        for number, own in enumerate(asked, 1):
            if own.each:
                parts += make(number, own, baselines(own.group, groups), by_label)
            if key == makers[0][0] or not own.each:
                parts += [Missing(own.group.label, reason) for reason in own.reasons]
        if not parts:
            parts.append(Missing(title, "no run has several students that were trained together"))
        sections.append(Section(key, title, tuple(parts)))
    return sections


Others = Mapping[str, Answers]
AloneOf = Mapping[str, Alone]


def _calibration(number: int, own: Answers, _: AloneOf, __: Others) -> list[Part]:
    given = own.first
    found = [[calibration(c, r) for c, r in zip(g.confidence, g.correct, strict=True)] for g in own.each]
    rows = []
    for place, name in enumerate(given.names):
        columns = (
            [100 * each.correct[place].mean() for each in own.each],
            [100 * each.confidence[place].mean() for each in own.each],
            [each[place].ece for each in found],
        )
        rows.append((heading(name), *(str(spread(map(float, values))) for values in columns)))
    caption = f"{own.named}, {len(given.labels):,} test images: calibration error (ECE) with {BINS} bins, per cent"
    figures = [
        reliability(
            f"reliability-{number}-{given.names[place]}",
            f"Reliability of {heading(given.names[place])}{_seed(own)}, ECE {found[0][place].ece:.2f}",
            found[0][place].confidence,
            found[0][place].accuracy,
            found[0][place].counts,
            found[0][place].ece,
        )
        for place in _extremes(own)
    ]
    note = "Bars: accuracy in each bin of confidence, pale with fewer than 10 images; dashed: perfect calibration."
    table = Table(caption, ("", "top-1", "mean confidence", "ECE"), tuple(rows))
    return [table, Figures("", tuple(figures)), *([Text(note)] if number == 1 else [])]


def _seed(own: Answers) -> str:
    """Return which run a figure is of, if there are several."""
    return f", seed {own.runs[0].config.seed}" if len(own.group.runs) > 1 else ""


def _extremes(own: Answers) -> list[int]:
    """Return the places of the first student, the last one, and the ensemble."""
    last, present = len(own.group.run.description.students), own.first.names
    names = ["student_1", f"student_{last}", *(["ensemble"] if last > 1 else [])]
    return [present.index(name) for name in dict.fromkeys(names) if name in present]


def _students(given: Predictions) -> list[int]:
    return [place for place, name in enumerate(given.names) if name.startswith("student_")]


def _agreement(number: int, own: Answers, _: AloneOf, __: Others) -> list[Part]:
    places = _students(own.first)
    if len(places) < 2:
        return []
    names = [heading(own.first.names[p]).removeprefix("student ") for p in places]
    found = [diversity(each.predicted[places], each.labels) for each in own.each]
    facts = (
        ("mean disagreement of two students", str(spread(each.disagreement for each in found))),
        ("images that all students have right", str(spread(each.all_right for each in found))),
        ("images that all students have wrong", str(spread(each.all_wrong for each in found))),
    )
    pair = ("student", "student")
    same = np.mean([each.agreement for each in found], 0)
    errors = _mean_there([each.error_correlation for each in found])
    over = f", mean of {len(found)} seeds" if len(found) > 1 else ""
    agreement = heat_map(
        f"agreement-{number}", f"Agreement: same class, per cent{over}", same, names, names, 1, pair
    )
    correlation = heat_map(
        f"errors-{number}",
        f"Correlation of errors{over}",
        errors,
        names,
        names,
        2,
        pair,
        limits=(0.0, 1.0),
    )
    return [
        Table(f"{own.named}, per cent of the test images", ("", "per cent"), facts),
        Figures("", (agreement, correlation)),
    ]


def _mean_there(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of arrays, element by element, of what is not nan; nan where nothing is left."""
    stacked = np.stack(arrays)
    there = ~np.isnan(stacked)
    count, total = there.sum(0), np.where(there, stacked, 0).sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _recall(own: Answers, name: str, classes: int) -> np.ndarray:
    """Return the recall of a predictor in each class, (K,), mean over the seeds."""
    place = own.first.names.index(name)
    found = [recall_by_class(each.predicted[[place]], each.labels, classes)[0] for each in own.each]
    return _mean_there(found)


def _classes(number: int, own: Answers, alone: AloneOf, others: Others) -> list[Part]:
    names, given = own.group.run.description.class_names, own.first
    figures: list[Figure] = []
    parts: list[Part] = []
    students = [given.names[place] for place in _students(given)]
    columns, gains = [], []
    for name in students:
        beside = alone.get(name)
        its = others[beside.group.label] if beside else None
        if its and its.each and beside:
            before = _recall(its, beside.row.predictor, len(names))
        elif not alone and name != students[0]:
            before = _recall(own, students[0], len(names))
        else:
            continue
        columns.append(heading(name).removeprefix("student "))
        gains.append(_recall(own, name, len(names)) - before)
    against = "the same network trained alone" if alone else "student 1"
    over = f", mean of {len(own.each)} seeds" if len(own.each) > 1 else ""
    if gains and len(names) <= MATRIX:
        key, title = f"gains-{number}", f"Gain in recall over {against}, points{over}"
        figures.append(
            heat_map(key, title, np.stack(gains, -1), names, columns, 1, ("class", "student"), signed=True)
        )
    elif gains:
        parts.append(_largest_gains(own, names, columns, np.stack(gains, -1), against))
    for place in _extremes(own)[1:] or _extremes(own):
        each = [confusion(answers.predicted[place], answers.labels, len(names)) for answers in own.each]
        counts, digits = np.mean(each, 0), int(len(each) > 1)
        title = f"Confusion of {heading(given.names[place])}, images{over}"
        if len(names) <= MATRIX:
            key, axes = f"confusion-{number}-{given.names[place]}", ("class", "answer")
            figures.append(heat_map(key, title, counts, names, names, digits, axes, hide_zero=True))
        else:
            parts.append(_most_confused(f"{own.named}: {title}", names, counts, digits))
    return [*([Figures(own.named, tuple(figures))] if figures else []), *parts]


def _largest_gains(
    own: Answers, names: Sequence[str], columns: Sequence[str], gains: np.ndarray, against: str
) -> Table:
    mean = np.nanmean(gains, -1)
    order = [i for i in np.argsort(-mean) if not np.isnan(mean[i])]
    shown = order if len(order) <= LISTED else [*order[: LISTED // 2], *order[-LISTED // 2 :]]
    rows = tuple((names[i], *(f"{gain:+.1f}" for gain in gains[i])) for i in shown)
    caption = (
        f"{own.named}: gain in recall over {against}, points; classes with the largest gains and losses"
    )
    return Table(caption, ("class", *(f"student {name}" for name in columns)), rows)


def _most_confused(caption: str, names: Sequence[str], counts: np.ndarray, digits: int) -> Table:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None, kind="stable")[:LISTED]]
    rows = tuple(
        (names[i], names[j], f"{wrong[i, j]:,.{digits}f}", f"{counts[i].sum():,.0f}")
        for i, j in order
        if wrong[i, j]
    )
    return Table(f"{caption}: most frequent mistakes", ("class", "answer", "images", "of"), rows)


def _disputed(number: int, own: Answers, _: AloneOf, __: Others) -> list[Part]:
    given, students, name = own.first, _students(own.first), own.first_named
    if len(students) < 2:
        return []
    names = own.group.run.description.class_names
    places = most_disputed(given.predicted[students], given.labels, DISPUTED)
    if not places:
        return [Missing(name, "its students agree on every test image")]
    assert own.data is not None
    try:
        images = read_images(own.data, places, given.labels)
    except UserError as error:
        return [Missing(name, str(error))]
    rows = []
    for image, place in zip(images, places, strict=True):
        answers = tuple(names[given.predicted[p, place]] for p in range(len(given.names)))
        rows.append((image, names[given.labels[place]], answers, place))
    pictures = tuple(
        picture(image, f"{label}", f"test image {place}, class {label}") for image, label, _, place in rows
    )
    table = Table(
        f"{name}: what each network takes them for",
        ("image, class", *map(heading, given.names)),
        tuple((f"{place}, {label}", *answers) for _, label, answers, place in rows),
    )
    header = tuple(f"image {place}" for *_, place in rows)
    return [
        Pictures(f"disputed-{number}", f"{name}: images and their classes", header, (("", pictures),)),
        table,
    ]
