"""A report on runs: numbers against references, figures, the page in a browser, and what is said of bad input."""

import dataclasses
import importlib
import io
import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ROOT,
    command,
    contrast,
    fresh_student,
    luminance,
    one_device,
    student_from_torch,
    tiny_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ekd_jax.common.errors import UserError
from ekd_jax.common.spread import spread
from ekd_jax.config.recipes import DATA, paper
from ekd_jax.config.resolve import resolve
from ekd_jax.data.augment import normalize
from ekd_jax.runs.report import answers, charts, plot, statistics
from ekd_jax.runs.report.document import Figures, Missing, Table
from ekd_jax.runs.report.figure_files import SHARP, draw
from ekd_jax.runs.report.gradcam import activation_maps, class_activation, similarity
from ekd_jax.runs.report.page import check_new, make_document, write_report
from ekd_jax.runs.report.paper import paper_row, published
from ekd_jax.runs.report.plot import Series
from ekd_jax.runs.report.predictions import Answers, ask, predict_all, read_images, test_data
from ekd_jax.runs.report.reading import Group, baselines, find_runs, read_groups, training_times
from ekd_jax.runs.report.shapes import (
    DARK,
    LIGHT,
    SURFACES,
    WIDTH,
    Box,
    Canvas,
    Mark,
    color_of,
    colors,
)
from ekd_jax.runs.report.svg import svg
from ekd_jax.runs.run import load_run
from ekd_jax.students.formats import html
from ekd_jax.students.formats.chromium import chromium, find_chromium
from ekd_jax.students.torch_names import sources
from ekd_jax.training import single

test_data.__test__ = False  # pytest would take it for a test
needs_browser = pytest.mark.skipif(
    html.working_browser() is None, reason="no Chromium that starts: apt-get install chromium"
)


# --- numbers -------------------------------------------------------------------------------------


def some_answers(predictors=4, images=200, classes=5):
    generator = np.random.default_rng(0)
    labels = generator.integers(classes, size=images)
    predicted = np.where(
        generator.random((predictors, images)) < 0.6, labels, generator.integers(classes, size=images)
    )
    return predicted, labels


def test_calibration_error_is_that_of_the_formula():
    generator = np.random.default_rng(1)
    confidence = np.concatenate([generator.random(300), [1.0, 1 / 15, 2 / 15]])
    correct = generator.random(303) < 0.7
    expected = 0.0
    for low in range(15):
        chosen = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if chosen.any():
            expected += chosen.mean() * abs(correct[chosen].mean() - confidence[chosen].mean())
    found = statistics.calibration(confidence, correct)
    assert found.ece == pytest.approx(100 * expected, rel=1e-12)
    assert sum(found.counts) == 303
    perfect = statistics.calibration(np.ones(4), np.ones(4, bool))
    assert perfect.ece == 0
    assert perfect.counts[-1] == 4


def test_agreement_is_counted_image_by_image():
    predicted, labels = some_answers()
    found = statistics.diversity(predicted, labels)
    for i, own in enumerate(predicted):
        for j, other in enumerate(predicted):
            assert found.agreement[i, j] == pytest.approx(
                100 * np.mean([a == b for a, b in zip(own, other, strict=True)])
            )
    np.testing.assert_allclose(found.error_correlation, np.corrcoef(predicted != labels), rtol=1e-12)
    pairs = [(i, j) for i in range(4) for j in range(i)]
    assert found.disagreement == pytest.approx(np.mean([100 - found.agreement[pair] for pair in pairs]))
    assert found.all_right == pytest.approx(
        100 * np.mean([set(c) == {k} for c, k in zip(predicted.T, labels, strict=True)])
    )
    assert found.all_wrong == pytest.approx(
        100 * np.mean([k not in c for c, k in zip(predicted.T, labels, strict=True)])
    )
    faultless = statistics.diversity(np.stack([labels, predicted[0]]), labels)
    assert np.isnan(faultless.error_correlation[0, 1])


def test_the_most_disputed_images_come_first():
    predicted = np.array([[0, 1, 2, 0], [0, 1, 1, 1], [0, 1, 0, 1]])
    assert statistics.most_disputed(predicted, np.array([0, 0, 0, 0]), 9) == [2, 3]
    assert statistics.most_disputed(predicted, np.array([0, 0, 0, 0]), 1) == [2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12))
def test_the_pareto_front_is_all_that_nothing_beats(points):
    def beaten(i):
        cost, score = points[i]
        return any((c <= cost and s >= score) and (c, s) != (cost, score) for c, s in points)

    front = statistics.pareto_front([c for c, _ in points], [s for _, s in points])
    assert sorted(front) == [i for i in range(len(points)) if not beaten(i)]


def test_spread():
    found = spread([90.0, 92.0, 97.0])
    assert (found.mean, found.std) == (pytest.approx(93), pytest.approx(np.std([90, 92, 97], ddof=1)))
    assert str(found) == "93.00 ± 3.61"
    assert f"{found:.3f}" == "93.000 ± 3.606"
    assert str(spread([90.0])) == "90.00"


# --- the paper -----------------------------------------------------------------------------------


def test_the_papers_numbers_are_those_of_the_documentation():
    text = (
        (ROOT / "docs/reference/published_results.md")
        .read_text()
        .partition("## OEM-KD")[2]
        .partition("Table 4")[0]
    )
    names = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "SVHN": "svhn", "ImageNet": "imagenet"}
    for title, data in names.items():
        table = text.partition(f"\n{title}:\n")[2].strip().split("\n\n")[0]
        rows = [line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]]
        pairs = [[tuple(map(float, cell.split(" / "))) for cell in row] for row in rows]
        stored = [
            list(zip(own["alone"], own["ensemble"], strict=True)) for own in published()[data].values()
        ]
        assert pairs == stored


def test_every_row_of_the_paper_has_a_recipe_and_no_other_setting_gets_one():
    for data, networks in published().items():
        for name in networks:
            found = paper_row(resolve(paper(name, data)))
            assert found is not None
            assert found.epochs == DATA[data].epochs
    config = paper("resnet20", "cifar10")
    for knob, value in (("students", 4), ("name", "resnet56"), ("students", (1, 0.5, 0.4, 0.3, 0.2))):
        other = paper("resnet20", "cifar10")
        other.model[knob] = value
        assert paper_row(resolve(other)) is None
    config.data.train_examples = 1000
    assert paper_row(resolve(config)) is None


# --- figures -------------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_ticks_cover_the_data(values):
    axis = plot.linear_axis(values)
    unseen = 1e-6 + 1e-8 * (max(values) - min(values))  # far less than a pixel
    assert axis.low == axis.ticks[0] <= min(values) + unseen
    assert axis.high == axis.ticks[-1] >= max(values) - unseen
    assert 2 <= len(axis.ticks) <= 8
    assert list(axis.ticks) == sorted(set(axis.ticks))


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=9))
def test_logarithmic_ticks_cover_the_data(values):
    axis = plot.log_axis(values)
    assert axis.ticks[0] <= min(values) * (1 + 1e-6)
    assert axis.ticks[-1] >= max(values) * (1 - 1e-6)
    assert all(-1e-6 <= axis.share(v) <= 1 + 1e-6 for v in values)
    assert len(axis.ticks) >= 2


def numbers_of(figure):
    """All elements of a figure that have a place, with the corners of what they cover."""
    for element in ElementTree.fromstring(svg(figure, alone=True)).iter():
        kind, own = element.tag.rpartition("}")[2], element.attrib
        if kind in ("polyline", "polygon"):
            yield kind, [tuple(map(float, pair.split(","))) for pair in own["points"].split()]
        elif kind == "rect":
            x, y, w, h = (float(own.get(name, 0)) for name in ("x", "y", "width", "height"))
            yield kind, [(x, y), (x + w, y + h)]
        elif kind == "line":
            yield kind, [(float(own["x1"]), float(own["y1"])), (float(own["x2"]), float(own["y2"]))]
        elif kind == "circle":
            yield kind, [(float(own["cx"]), float(own["cy"]))]
        elif kind == "text" and "transform" not in own:
            x, width = float(own["x"]), len(element.text or "") * 5.5
            start = x - width * {"end": 1, "middle": 0.5}.get(own.get("text-anchor", ""), 0)
            yield kind, [(start, float(own["y"])), (start + width, float(own["y"]))]


def assert_inside(figure):
    for kind, corners in numbers_of(figure):
        for x, y in corners:
            assert -1 <= x <= WIDTH + 1, (figure.key, kind, corners)
            assert -1 <= y <= figure.height + 1, (figure.key, kind, corners)


def all_kinds():
    generator = np.random.default_rng(0)
    long = "a very long name of a class, of which there is too much for a line of any figure at all"
    series = []
    for i in range(8):
        points = tuple((float(x), float(y)) for x, y in generator.random((6, 2)) * 10**i + 1e-3)
        series.append(
            Series(
                f"{long} {i}", points, 1 + i % 6, tuple(generator.random(6)), tuple("123456"), shift=i - 4
            )
        )
    yield charts.line_chart("lines", "Lines", series, ("x", long))
    yield charts.line_chart(
        "logs", "Logs", series, ("x", "y"), log_x=True, log_y=True, front=series[2].points
    )
    yield charts.line_chart("point", "One point", [Series("a", ((3.0, 3.0),), 1)], ("x", "y"))
    yield charts.bar_chart(
        "bars", "Bars", [(long, 3.0, 1, "3.0 s (1.00)"), ("b", 0.0, 2, "0 s (0.00)")], long
    )
    for k in (1, 5, 25):
        names = [f"class {i}" if i else long for i in range(k)]
        values = generator.normal(size=(k, k)) * 100
        yield charts.heat_map(
            f"heat-{k}", "Heat", values, names, names, 1, ("class", "answer"), signed=True
        )
    yield charts.heat_map("empty", "Empty", np.full((2, 2), np.nan), "ab", "cd", 1, ("a", "b"))
    found = statistics.calibration(generator.random(50), generator.random(50) < 0.5)
    yield charts.reliability("reliability", "R", found.confidence, found.accuracy, found.counts, found.ece)


@pytest.mark.parametrize("figure", list(all_kinds()), ids=lambda figure: figure.key)
def test_figures_stay_in_their_box_and_say_what_they_show(figure):
    assert_inside(figure)
    root = ElementTree.fromstring(svg(figure, alone=True))
    assert root.attrib["role"] == "img"
    assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"]
    assert all(child.text for child in list(root)[:2])
    assert "script" not in svg(figure)
    assert len(svg(figure)) < 60_000
    assert all(len(row) == len(figure.header) for row in figure.rows)


def test_no_two_series_look_the_same():
    looks = set()
    for number in range(20):
        own = Series("a", ((0.0, 1.0),), number)
        canvas = Canvas()
        canvas.mark(0, 0, number)
        looks.add((color_of(number), plot.dash_of(own), canvas.shapes))
    assert len(looks) == 20


def test_points_are_at_their_places():
    points = ((0.0, 0.0), (5.0, 50.0), (10.0, 100.0))
    figure = charts.line_chart("a", "A", [Series("a", points, 1)], ("x", "y"))
    (line,) = [corners for kind, corners in numbers_of(figure) if kind == "polyline" and len(corners) == 3]
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x0 < x1 < x2
    assert y0 > y1 > y2, "upwards on the page is downwards in SVG"
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    rules = [corners for kind, corners in numbers_of(figure) if kind == "line"]
    ticks = [corners[0][1] for corners in rules if corners[0][1] == corners[1][1]]
    assert min(ticks) == pytest.approx(y2, abs=0.1)
    assert max(ticks) == pytest.approx(y0, abs=0.1)


def pixel(png, x, y):
    """The color of a PNG at a place of the figure."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return "#{:02x}{:02x}{:02x}".format(*image.getpixel((round(x * SHARP), round(y * SHARP))))


KINDS = [each for each in all_kinds() if each.key in ("lines", "point", "bars", "heat-5")]


@pytest.mark.parametrize("figure", KINDS, ids=lambda figure: figure.key)
def test_png_and_pdf_have_the_shapes_of_the_svg(figure):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[figures]'")
    png = draw(figure, "png")
    assert Image.open(io.BytesIO(png)).size == (WIDTH * SHARP, int(figure.height * SHARP))
    drawn = [shape for shape in figure.shapes if isinstance(shape, Box | Mark)]
    for i, shape in enumerate(drawn):
        later = drawn[i + 1 :]
        if isinstance(shape, Mark) and not any(abs(shape.x - o.x) + abs(shape.y - o.y) < 20 for o in later):
            assert pixel(png, shape.x, shape.y) == colors("light")[shape.color]
    pdf = draw(figure, "pdf")
    assert pdf.startswith(b"%PDF")
    assert figure.title.encode() in pdf
    assert (png, pdf) == (draw(figure, "png"), draw(figure, "pdf")), (
        "the same files, whenever they are made"
    )


def test_formats_that_cannot_be_drawn_are_refused_before_anything_is_computed(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="'eps' is none of png, pdf"):
        write_report([str(tmp_path)], tmp_path / "out", formats=["png", "eps"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape("pip install 'ekd_jax[figures]'")):
        write_report([str(tmp_path)], tmp_path / "out", formats=["pdf"])


@pytest.mark.parametrize(("scheme", "colors"), [("light", LIGHT), ("dark", DARK)])
def test_colors_stand_out_from_the_page(scheme, colors):
    card, _, quiet = SURFACES[scheme]
    assert contrast(colors[0], card) >= 7
    assert contrast(quiet, card) >= 4.5
    assert all(contrast(color, card) >= 3 for color in colors)
    for color in colors[1:3]:  # of the darkest cells of a heat map, under text
        parts = [(int(color[i : i + 2], 16), int(card[i : i + 2], 16)) for i in (1, 3, 5)]
        mixed = "#" + "".join(f"{round(charts.SHADE * a + (1 - charts.SHADE) * b):02x}" for a, b in parts)
        assert contrast(colors[0], mixed) >= 4.5


# --- Grad-CAM ------------------------------------------------------------------------------------


def a_student(network="resnet8", width="1/4", size=12):
    """An untrained student, with batch statistics that are not those of nothing."""
    student = fresh_student(tuple("0123456789"), (size, size, 3))
    own = dataclasses.replace(student.description.network, name=network, widths=(width,) * 3)
    student = dataclasses.replace(
        student, description=dataclasses.replace(student.description, network=own)
    )
    trace = student.ensemble.trace((size, size, 3))
    variables = student.ensemble.student_variables(trace.init(0), 1)
    generator = np.random.default_rng(0)
    stats = jax.tree.map(
        lambda x: generator.uniform(0.5, 1.5, x.shape).astype(x.dtype), variables["batch_stats"]
    )
    return dataclasses.replace(student, variables={**variables, "batch_stats": stats})


def some_images(count, size=12):
    generator = np.random.default_rng(1)
    return generator.integers(256, size=(count, size, size, 3), dtype=np.uint8), generator.integers(
        10, size=count
    )


@pytest.mark.parametrize(("network", "width"), [("resnet8", "1/4"), ("wrn_16_1", "1/2")])
def test_grad_cam_of_a_linear_classifier_is_the_closed_form(network, width):
    """Behind a mean and a linear layer the gradient is the kernel's column, divided by the number of pixels."""
    student = a_student(network, width)
    images, labels = some_images(3)
    maps, apart = class_activation(student.network, student.variables, images / 255.0, labels)
    pooled = student.network(student.variables, images / 255.0).pooled
    kernel = student.variables["params"]["head"]["linear"]["kernel"]
    weights = kernel[:, labels].T / math.prod(pooled.shape[1:3])
    np.testing.assert_allclose(
        maps, np.maximum(np.einsum("bhwc,bc->bhw", pooled, weights), 0), rtol=1e-4, atol=1e-7
    )
    assert apart < 1e-5


@pytest.mark.parametrize(("network", "width"), [("resnet8x4", "1"), ("wrn_16_1", "1")])
def test_grad_cam_is_that_of_pytorch(network, width):
    """Hooks on the module before pooling, and `backward` from the class logit, as in the paper's own procedure."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[parity]'")
    networks = importlib.import_module("torch_networks")
    student = a_student(network, width)
    images, labels = some_images(4)
    torch.manual_seed(0)
    theirs = networks.NETWORKS[network](num_classes=10).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = {name: value for name, value in theirs.state_dict().items() if "num_batches" not in name}
    variables = student_from_torch(student.variables, state, sources(network)[0].rules)
    seen = {}
    pool = next(module for module in theirs.modules() if isinstance(module, networks.GlobalPool))
    pool.register_forward_pre_hook(lambda _, inputs: seen.update(map=inputs[0]))
    logits = theirs(torch.from_numpy((images / 255.0).astype(np.float32).transpose(0, 3, 1, 2).copy()))
    chosen = logits[torch.arange(4), torch.from_numpy(labels)].sum()
    (gradient,) = torch.autograd.grad(chosen, seen["map"])
    expected = torch.relu((gradient.mean((2, 3), keepdim=True) * seen["map"]).sum(1)).detach().numpy()
    found, _ = class_activation(
        student.network, variables, jnp.asarray(images / 255.0, jnp.float32), labels
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_similarity_is_pearsons_correlation():
    generator = np.random.default_rng(0)
    own, other = generator.random((2, 5, 4, 4))
    own[4] = 0
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(own[:4], other[:4], strict=True)]
    found = similarity(own, other)
    np.testing.assert_allclose(found[:4], expected, rtol=1e-12)
    assert np.isnan(found[4]), "a constant map has no correlation"


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The students of `finished`, each trained alone, in one run."""
    path = tmp_path_factory.mktemp("alone") / "run"
    single.run(tiny_config("baseline"), path, one_device())
    return path


def another(source, path, changes=None, summary=True):
    """Copy a run under another configuration: what a report reads of a run with these knobs."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    for name, value in (changes or {}).items():
        section, _, knob = name.rpartition(".")
        (config[section] if section else config)[knob] = value
    (path / "config.json").write_text(json.dumps(config))
    if not summary:
        (path / "summary.json").unlink()
    return path


@pytest.fixture(scope="module")
def runs(finished, alone, tmp_path_factory):
    """Two seeds of an ensemble, of which the second is better by a point, its baseline, and one not complete."""
    folder = tmp_path_factory.mktemp("runs")
    second = another(finished[0], folder / "second", {"seed": 7})
    summary = json.loads((second / "summary.json").read_text())
    for result in (*summary["students"], summary["ensemble"]):
        result["top1_last"] += 1
    summary["seconds"]["train"] = 10.0
    (second / "summary.json").write_text(json.dumps(summary))
    going = another(finished[0], folder / "going", {"train.epochs": 6.0}, summary=False)
    return [finished[0], second, alone, going]


@pytest.fixture(scope="module")
def groups(runs):
    return read_groups(find_runs(runs))


def test_runs_that_differ_in_their_seed_alone_are_one_row(groups, finished):
    assert [len(group.runs) for group in groups] == [2, 1, 1]
    ours, base, going = groups
    assert [run.seed for run in ours.runs] == [0, 7]
    _, summary = finished
    top1 = summary.students[0].top1_last
    row = ours.rows[0]
    assert row.last.values == (top1, top1 + 1)
    assert (row.last.mean, row.last.std) == (pytest.approx(top1 + 0.5), pytest.approx(math.sqrt(0.5)))
    assert [row.predictor for row in ours.rows] == ["student_1", "student_2", "ensemble"]
    assert not going.complete
    assert "not complete" in going.label
    assert going.rows[0].last.mean == pytest.approx(top1), "its latest evaluation"
    assert base.method == "baseline"


def test_students_are_beside_the_same_network_alone(groups):
    ours, base, going = groups
    found = baselines(ours, groups)
    assert {name: each.row.predictor for name, each in found.items()} == {
        f"student_{i}": f"student_{i}" for i in (1, 2)
    }
    assert all(each.group is base for each in found.values())
    assert baselines(base, groups) == {}
    assert baselines(going, groups) == {}, "it trains for other epochs"


def test_time_against_separate_runs(groups, alone, tmp_path):
    found = training_times(groups[0], groups)
    assert found.in_turn is None
    assert found.missing == (1, 2)
    seconds = json.loads((alone / "summary.json").read_text())["seconds"]["train"]
    assert found.together.mean == pytest.approx(seconds)
    singles = []
    for number in (1, 2):  # runs of one student each, of 4 and 5 seconds
        path = another(alone, tmp_path / str(number), {"model.students": [0.25 / number]})
        for name in ("students.json", "summary.json"):
            record = json.loads((path / name).read_text())
            record["students"] = [record["students"][number - 1] | {"student": 1}]
            record |= {"seconds": {"train": 3.0 + number}} if name == "summary.json" else {}
            (path / name).write_text(json.dumps(record))
        singles.append(path)
    together = [groups[0], *read_groups(singles)]
    found = training_times(together[0], together)
    assert (found.in_turn, found.in_parallel, found.missing) == (9.0, 5.0, ())
    assert found.together is None


@pytest.fixture(scope="module")
def predicted(finished):
    """A run, its test images, and its predictions of them."""
    run = load_run(finished[0])
    data = test_data(run)
    return run, data, predict_all(run, data)


def test_predictions_are_those_of_evaluate(predicted):
    run, data, given = predicted
    evaluated = run.evaluate(confusion=True)
    for place, name in enumerate(given.names):
        assert 100 * given.correct[place].mean() == pytest.approx(evaluated[f"{name}/top1"])
        counts = statistics.confusion(given.predicted[place], given.labels, 10)
        np.testing.assert_array_equal(counts, evaluated.counts.confusion[place])
        recall = statistics.recall_by_class(given.predicted, given.labels, 10)[place]
        assert recall[3] == pytest.approx(evaluated.of_classes(name)["three"]["recall"])
    places = [5, 0, 897]
    images = read_images(data, places, given.labels)
    probabilities = jax.nn.softmax(run.logits(images))
    np.testing.assert_allclose(probabilities.max(-1), given.confidence[:, places], rtol=1e-5)
    with pytest.raises(UserError, match="another order"):
        read_images(data, [0], (given.labels + 1) % 10)


def test_many_classes_are_lists(predicted, groups, monkeypatch):
    monkeypatch.setattr(answers, "MATRIX", 9)
    monkeypatch.setattr(answers, "LISTED", 4)
    monkeypatch.setattr(answers, "_disputed", lambda *_: [])
    monkeypatch.setattr(answers, "explanations", lambda *_: [])
    group = groups[0]
    _, data, given = predicted
    sections = answers.answer_sections([Answers(group, (group.run,), (given,), data)], [group])
    gains, mistakes, _ = next(s for s in sections if s.key == "classes").parts
    recall = statistics.recall_by_class(given.predicted, given.labels, 10)
    difference = dict(zip(group.run.description.class_names, recall[1] - recall[0], strict=True))
    assert [row[1] for row in gains.rows] == [f"{difference[row[0]]:+.1f}" for row in gains.rows]
    assert len(gains.rows) == len(mistakes.rows) == 4
    assert float(gains.rows[0][1]) == max(float(f"{value:+.1f}") for value in difference.values())
    counts = [int(row[2]) for row in mistakes.rows]
    matrix = statistics.confusion(given.predicted[1], given.labels, 10)
    assert counts == sorted(matrix[~np.eye(10, dtype=bool)], reverse=True)[:4]


def test_numbers_are_of_all_seeds_and_pictures_of_the_first(predicted, groups, monkeypatch):
    monkeypatch.setattr(answers, "explanations", lambda *_: [])
    group = groups[0]
    _, data, given = predicted
    generator = np.random.default_rng(0)
    worse = np.where(generator.random(given.predicted.shape) < 0.3, 0, given.predicted)
    second = dataclasses.replace(given, predicted=worse, confidence=given.confidence**2)
    both = (given, second)
    asked = Answers(group, tuple(run.run for run in group.runs), both, data, ("seed 9 has no checkpoint",))
    sections = {section.key: section.parts for section in answers.answer_sections([asked], [group])}
    table, figures, *_, missing = sections["calibration"]
    eces = [statistics.calibration(each.confidence[1], each.correct[1]).ece for each in both]
    assert table.rows[1][3] == str(spread(eces))
    assert table.rows[1][1] == str(spread(100 * each.correct[1].mean() for each in both))
    assert "n = 2" in table.caption
    assert f"seed {group.first.seed}, ECE" in figures.figures[0].title
    assert missing.reason == "seed 9 has no checkpoint"
    agreement = sections["agreement"][1].figures[0]
    same = np.mean([100 * (each.predicted[0] == each.predicted[1]).mean() for each in both])
    assert agreement.rows[0][2] == f"{same:.1f}"
    gains, *_, confusion = sections["classes"][0].figures
    recall = np.mean([statistics.recall_by_class(each.predicted, each.labels, 10) for each in both], 0)
    assert [float(row[1]) for row in gains.rows] == pytest.approx(recall[1] - recall[0], abs=0.051)
    counts = np.mean([np.bincount(each.predicted[-1], minlength=10)[0] for each in both])
    assert sum(float(row[1] or 0) for row in confusion.rows) == pytest.approx(counts, abs=0.5)
    assert f"seed {group.first.seed}" in sections["disputed"][0].caption


def test_a_seed_without_a_checkpoint_is_said_and_the_others_count(finished, tmp_path):
    whole, broken = (another(finished[0], tmp_path / str(seed), {"seed": seed}) for seed in (1, 2))
    shutil.rmtree(broken / "checkpoints")
    (asked,) = ask(read_groups([whole, broken]))
    assert [run.config.seed for run in asked.runs] == [1]
    assert len(asked.each) == 1
    assert any("checkpoint" in reason for reason in asked.reasons)


def test_maps_of_a_trained_student_have_the_size_of_the_images(predicted):
    run, data, given = predicted
    images = read_images(data, range(70), given.labels)
    student = run.student(1)
    labels = np.arange(70) % 10
    maps = activation_maps(student, images, labels)
    assert maps.shape == (70, 8, 8)
    own = student.description.preprocessing
    small, _ = class_activation(
        student.network, student.variables, normalize(images, own.mean, own.std), labels
    )
    np.testing.assert_allclose(maps, jax.image.resize(small, (70, 8, 8), "bilinear"), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """The report of all runs, and its directory."""
    path = tmp_path_factory.mktemp("report") / "new" / "report"
    return write_report([str(run) for run in runs], path), path


def test_the_report_has_every_part(report):
    document, path = report
    assert [section.key for section in document.sections] == [
        *(
            "runs",
            "accuracy",
            "cost",
            "time",
            "curves",
            "calibration",
            "agreement",
            "classes",
            "disputed",
            "gradcam",
        ),
    ]
    keys = [figure.key for figure in document.figures]
    assert len(keys) == len(set(keys))
    assert sorted(f"{key}.svg" for key in keys) == sorted(
        file.name for file in (path / "figures").iterdir()
    )
    for figure in document.figures:
        assert_inside(figure)
        ElementTree.parse(path / "figures" / f"{figure.key}.svg")
    text = (path / "report.html").read_text()
    without_images = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert len(without_images) < 2_000_000
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert re.search(r'Content-Security-Policy" content="default-src \'none\'', text)
    assert text.count("<figure>") == text.count('role="img"') == len(keys)
    assert text.count("<figure>") == text.count("<details><summary>Numbers")
    assert text.count("<caption>") == text.count("<table>")
    markdown = (path / "report.md").read_text()
    linked = re.findall(r"\]\(([^)]*)\)", markdown)
    assert {str(file.relative_to(path)) for file in path.glob("*/*")} == set(linked)


def test_what_cannot_be_had_says_why(report):
    document, path = report
    missing = {
        part.what: part.reason for s in document.sections for part in s.parts if isinstance(part, Missing)
    }
    assert "one of its rows" in missing["The paper's rows"]
    assert "ekd benchmark" in missing["File size and latency"]
    assert "students 1 and 2" in missing["In turn and in parallel"]
    text = (path / "report.html").read_text()
    assert all(f"<strong>{what.replace(chr(39), '&#x27;')}:</strong> left out" in text for what in missing)


def test_accuracy_is_beside_the_baseline_in_the_table(report, groups):
    document, _ = report
    accuracy = next(section for section in document.sections if section.key == "accuracy")
    table = next(part for part in accuracy.parts if isinstance(part, Table) and "alone" in part.header)
    row = dict(zip(table.header, table.rows[0], strict=True))
    own, base = groups[0].rows[0].last, groups[1].rows[0].last
    assert row["last"] == str(own)
    assert row["alone"] == str(base)
    assert row["difference"] == f"{own.mean - base.mean:+.2f}"


def test_a_run_that_has_just_begun(finished, tmp_path):
    path = another(finished[0], tmp_path / "begun", summary=False)
    (path / "metrics.jsonl").unlink()
    shutil.rmtree(path / "checkpoints")
    document = make_document(read_groups([path]))
    missing = [part for section in document.sections for part in section.parts if isinstance(part, Missing)]
    assert any("checkpoint" in part.reason for part in missing)
    assert any(part.what == "Accuracy against cost" for part in missing)
    assert not document.figures


def test_baselines_alone_and_missing_data(alone, finished, tmp_path):
    group = read_groups([alone])[0]
    document = make_document([group], predictions=False)
    reasons = [
        part.reason for section in document.sections for part in section.parts if isinstance(part, Missing)
    ]
    assert any("--nopredictions" in reason for reason in reasons)
    moved = another(
        finished[0], tmp_path / "moved", {"data.name": "folder", "data.data_dir": str(tmp_path / "gone")}
    )
    document = make_document(read_groups([moved]))
    reasons = [
        part.reason for section in document.sections for part in section.parts if isinstance(part, Missing)
    ]
    assert any("gone" in reason for reason in reasons)


def test_accuracy_on_held_out_images_is_not_taken_for_test_accuracy(groups, finished, tmp_path):
    path = another(finished[0], tmp_path / "run", {"data.validation_examples": 100}, summary=False)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record["split"] = {"test": "validation"}.get(record["split"], record["split"])
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    document = make_document([*groups, *read_groups([path])], predictions=False)
    accuracy, cost = (next(s for s in document.sections if s.key == key) for key in ("accuracy", "cost"))
    tables = [part for part in accuracy.parts if isinstance(part, Table)]
    assert len(tables[0].rows) == len(groups)
    assert "have no test accuracy yet" in tables[0].caption
    assert "per cent of the validation set" in tables[-1].caption
    points = next(part for part in cost.parts if isinstance(part, Figures)).figures[0].rows
    assert len(points) == sum(len(group.run.description.students) for group in groups)


def in_the_papers_setting(source, path, students, seconds):
    """A copy of a run that claims to be of ResNet-20 on CIFAR-10, as in the paper; all students are the first one."""
    another(source, path)
    ours = paper("resnet20", "cifar10").to_dict()
    if students == 1:
        ours["method"] = json.loads((source / "config.json").read_text())["method"]
        ours["model"]["students"] = [1.0]
    (path / "config.json").write_text(json.dumps(ours))
    for name in ("students.json", "summary.json"):
        record = json.loads((path / name).read_text())
        record["students"] = [record["students"][0] | {"student": i + 1} for i in range(students)]
        record |= {"seconds": {"train": seconds}} if name == "summary.json" else {}
        (path / name).write_text(json.dumps(record))
    return path


def test_the_paper_is_beside_its_own_setting(finished, alone, tmp_path):
    ours = in_the_papers_setting(finished[0], tmp_path / "oem", 5, 100.0)
    single_one = in_the_papers_setting(alone, tmp_path / "alone", 1, 40.0)
    document = make_document(read_groups([ours, single_one]), predictions=False)
    accuracy, time = (next(s for s in document.sections if s.key == key) for key in ("accuracy", "time"))
    table = next(part for part in accuracy.parts if isinstance(part, Table) and "paper" in part.header)
    assert [row[-2:] for row in table.rows[:2]] == [("92.13", "91.34"), ("92.18", "91.12")]
    assert "Table 2" in table.caption
    ((own, papers),) = [part.figures for part in time.parts if isinstance(part, Figures)]
    assert own.rows == (
        ("oem", "0:01:40 (1.00)"),
        ("alone, in turn", "0:03:20 (2.00)"),
        ("alone, in parallel", "40.0 s (0.40)"),
    )
    assert "Figure 2b" in papers.title
    assert papers.rows == (
        ("ensemble", "560 (1.00)"),
        ("alone, in turn", "1,223 (2.18)"),
        ("alone, in parallel", "898 (1.60)"),
    )


def test_the_papers_minutes_are_those_of_the_documentation():
    text = " ".join((ROOT / "docs/reference/published_results.md").read_text().split())
    for datasets, said in (
        (("cifar10", "cifar100"), "1.7 to 3.9 times less than five baselines one after another on CIFAR"),
        (("svhn",), "1.4 to 8 times on SVHN"),
        (("imagenet",), "1.4 to 1.5 times on ImageNet"),
    ):
        each = [own["minutes"] for data in datasets for own in published()[data].values()]
        ratios = [turn / ensemble for ensemble, turn, _ in each]
        assert said.startswith(f"{min(ratios):.1f} to {max(ratios):.2g} times")
        assert said in text
        assert all(ensemble < parallel < turn for ensemble, turn, parallel in each)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run, path: [], "name at least one run"),
        (lambda run, path: [path / "nothing"], "is no directory"),
        (lambda run, path: [path], "has no config.json"),
        (lambda run, path: [run, run], "given twice"),
        (lambda run, path: [run, another(run, path / "same")], "are the same run, seed 0"),
        (
            lambda run, path: [run, another(run, path / "x", {"data.name": "cifar10"})],
            "different data: data.name",
        ),
        (
            lambda run, path: [run, another(run, path / "x", {"data.test_split": "train"})],
            "data.test_split",
        ),
        (
            lambda run, path: [another(run, path / "x", {"model.later": 1})],
            "unknown knob config.model.later",
        ),
    ],
    ids=range(8),
)
def test_mistakes_are_one_line(finished, tmp_path, make, message):
    arguments = [*map(str, make(finished[0], tmp_path)), f"--output={tmp_path / 'out'}"]
    result = command("report", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(finished, tmp_path):
    (tmp_path / "there").mkdir()
    check_new(tmp_path / "there")
    (tmp_path / "there" / "file").touch()
    for path in (tmp_path / "there", tmp_path / "there" / "file"):
        with pytest.raises(UserError, match="exists"):
            write_report([str(finished[0])], path)
    flags = [str(finished[0]), f"--output={tmp_path / 'out'}", "--nopredictions"]
    result = command("report", *flags, largest_file=4096)
    assert result.returncode == 2
    assert "nothing of it is left" in result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["there"]


def test_the_command(finished, tmp_path):
    result = command("report", finished[0], f"--output={tmp_path / 'out'}", "--nopredictions")
    assert result.returncode == 0, result.stderr
    assert "left out: The paper's rows" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{tmp_path / 'out' / 'report.html'} and report.md")


def test_a_directory_of_compare_stands_for_its_runs(finished, alone, tmp_path):
    for label, source in (("alone", alone), ("with_kd", finished[0])):
        shutil.copytree(source, tmp_path / label / "seed0")
    assert find_runs([str(tmp_path)]) == [tmp_path / "alone" / "seed0", tmp_path / "with_kd" / "seed0"]
    searched = {"seed": 1, "model.students": [1.0, 0.7]}  # widths that a method found for this seed
    another(finished[0], tmp_path / "with_kd" / "seed1", searched)
    found = read_groups(find_runs([str(tmp_path)]))
    assert [(group.label, len(group.runs)) for group in found] == [("alone", 1), ("with_kd", 2)]
    own = tmp_path / "with_kd"
    assert find_runs([str(own)]) == [own / "seed0", own / "seed1"], "a folder of several seeds"


def test_a_plan_at_its_earlier_runs_stands_for_these(finished, tmp_path):
    for plan in ("plan", "all/oem/seed0"):
        shutil.copytree(finished[0], tmp_path / plan / "earlier" / "first")
    assert find_runs([str(tmp_path / "plan")]) == [tmp_path / "plan" / "earlier" / "first"]
    assert find_runs([str(tmp_path / "all")]) == [tmp_path / "all" / "oem" / "seed0" / "earlier" / "first"]


def test_groups_of_one_method_have_different_labels(finished, tmp_path):
    paths = [
        another(finished[0], tmp_path / str(epochs), {"train.epochs": epochs}) for epochs in (4.0, 5.0)
    ]
    found: list[Group] = read_groups([finished[0], *paths])
    assert [group.label for group in found] == ["oem (epochs 3)", "oem (epochs 4)", "oem (epochs 5)"]


def test_a_run_of_one_student_has_no_agreement(predicted, groups):
    _, data, given = predicted
    one = dataclasses.replace(
        given, names=("student_1",), predicted=given.predicted[:1], confidence=given.confidence[:1]
    )
    own = groups[1].run  # of the baseline
    description = dataclasses.replace(own.description, students=own.description.students[:1])
    run = dataclasses.replace(groups[1].first, run=dataclasses.replace(own, description=description))
    group = Group("alone", (run,))
    sections = {
        s.key: s.parts for s in answers.answer_sections([Answers(group, (run.run,), (one,), data)], [group])
    }
    for key in ("agreement", "disputed", "gradcam"):
        (part,) = sections[key]
        assert "several students" in part.reason
    assert [len(part.figures) for part in sections["classes"]] == [1], "confusion alone"


# --- in a browser --------------------------------------------------------------------------------


@needs_browser
def test_the_page_in_a_browser(report):
    document, path = report
    with chromium(find_chromium()) as opened:
        opened.send("Network.enable")
        opened.send("Log.enable")
        for width, scheme in ((1200, "light"), (390, "light"), (390, "dark")):
            opened.send(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=900,
                deviceScaleFactor=1,
                mobile=width < 500,
            )
            opened.send(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            opened.open(path / "report.html")
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            assert opened.evaluate(TOO_WIDE) == []
            drawn = opened.evaluate(SHOWN)
            assert len(drawn) == len(document.figures)
            assert all(wide > 200 and high > 40 for wide, high in drawn)
            assert opened.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            for ink, paper_color in opened.evaluate(COLORS):
                assert contrast(ink, paper_color) >= 4.5
            dark = luminance(opened.evaluate(PAPER)) < 0.2
            assert dark == (scheme == "dark")
        sent = [
            event["params"]["request"]["url"]
            for event in opened.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert all(url.startswith(("file://", "data:")) for url in sent)
        assert {url for url in sent if url.startswith("file")} == {
            (path / "report.html").resolve().as_uri()
        }
        assert not [event for event in opened.events if event["method"] == "Log.entryAdded"]
        assert opened.evaluate("document.querySelectorAll('h1').length") == 1
        assert opened.evaluate(
            "[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.ariaLabel)"
        )


HEX = "c => '#' + c.match(/[\\d.]+/g).slice(0, 3).map(v => (+v).toString(16).padStart(2, '0')).join('')"
PAPER = f"({HEX})(getComputedStyle(document.body).backgroundColor)"
SHOWN = "[...document.querySelectorAll('svg.figure')].map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"
TOO_WIDE = """[...document.querySelectorAll('main *')].filter(e => !e.closest('table')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
COLORS = f"""(() => {{
    const hex = {HEX}, paper = e => {{
        const own = getComputedStyle(e).backgroundColor;
        return own === 'rgba(0, 0, 0, 0)' && e.parentElement ? paper(e.parentElement) : own;
    }};
    return ['h1', 'header p', 'nav a', 'caption', 'thead th', 'td.number', 'figcaption', 'summary', '.missing']
        .map(s => document.querySelector(s)).map(e => [hex(getComputedStyle(e).color), hex(paper(e))]);
}})()"""
