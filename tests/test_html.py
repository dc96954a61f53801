"""A page that runs students in a browser: the same pixels and logits as in Python, and nothing from anywhere else."""

import base64
import dataclasses
import io
import json
import os
import pathlib
import re

import numpy as np
import pytest
from conftest import ROOT, command, contrast, fresh_student
from PIL import Image
from test_export import exported

import ekd_jax
from ekd_jax.common.errors import UserError
from ekd_jax.config.recipes import digits
from ekd_jax.config.resolve import resolve
from ekd_jax.data.decode import Reader
from ekd_jax.runs.exporting import some_test_images
from ekd_jax.students.description import Preprocessing, Provenance
from ekd_jax.students.formats import html
from ekd_jax.students.formats.chromium import BrowserError, chromium, find_chromium
from ekd_jax.students.formats.drawings import measure_drawings
from ekd_jax.students.formats.exportable import exportable_student
from ekd_jax.students.formats.html import facts_of, unpacked, write_page
from ekd_jax.students.formats.onnxruntime_web import SCRIPT, WASM, find_onnxruntime_web
from ekd_jax.students.formats.request import Options
from ekd_jax.students.student import read_image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
# `npm install onnxruntime-web` in the checkout, or the directory of a package that is elsewhere.
RUNTIME = pathlib.Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "node_modules" / "onnxruntime-web"))
needs_runtime = pytest.mark.skipif(
    not (RUNTIME / WASM).is_file(), reason=f"{RUNTIME} is missing: npm install onnxruntime-web"
)
needs_browser = pytest.mark.skipif(
    (RUNTIME / WASM).is_file() and html.working_browser() is None,
    reason="no Chromium that starts: apt-get install chromium",
)
COLOR = (6, 6, 3)


def student_of(shape=(8, 8, 1), fit="stretch", seed=0, classes=tuple("0123456789")):
    student = fresh_student(classes, shape, seed)
    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)) if shape[-1] == 3 else ((0.3,), (0.4,))
    own = dataclasses.replace(
        student.description,
        student=seed + 1,
        preprocessing=Preprocessing(mean, std, fit),
        provenance=Provenance("digits"),
        metrics={"top1": 98.7654},
    )
    return dataclasses.replace(student, description=own)


def some_digits():
    return some_test_images(resolve(digits(epochs=1)), (8, 8, 1))


@pytest.fixture(scope="module")
def runtime():
    return find_onnxruntime_web(RUNTIME)


@pytest.fixture(scope="module")
def students():
    return [student_of(seed=0), student_of(seed=1, classes=("</script>", *"123456789"))]


@pytest.fixture(scope="module")
def page(runtime, students):
    """A page with two networks, and a class name that would end a script."""
    names = students[1].class_names
    networks = [dataclasses.replace(exportable_student(each), class_names=names) for each in students]
    return write_page(networks, "float32", some_digits(), runtime)


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    """The page, opened from a file, with all requests in `events`."""
    file = tmp_path_factory.mktemp("page") / "student.html"
    file.write_bytes(page)
    with chromium(find_chromium()) as opened:
        opened.send("Network.enable")
        opened.send("Log.enable")
        opened.open(file)
        opened.evaluate("ekd.ready")
        yield opened


def as_base64(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


# ---- without a browser


@needs_runtime
def test_everything_is_in_the_file(page, runtime):
    text = page.decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none';"), "the browser itself refuses to load anything"
    assert "http" not in policy
    assert not re.search(r"<(link|script|img|iframe)[^>]*(src|href)=(?!\"data:)", text)
    assert unpacked(page, "runtime-wasm") == runtime.wasm
    assert unpacked(page, "runtime-script") == runtime.script
    assert "Permission is hereby granted" in text
    assert f"ONNX Runtime Web {runtime.version}" in text
    assert len(page) < 0.5 * len(runtime.wasm)
    facts = facts_of(page)
    assert facts["classes"][0] == "</script>"
    assert [s["name"] for s in facts["students"]] == ["Student 1", "Student 2"]
    assert facts["students"][0]["top1"] == 98.7654
    assert len(unpacked(page, "examples")) == 12 * 64


@needs_runtime
def test_without_a_browser_the_networks_in_the_page_are_run_in_python(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "working_browser", lambda: None)
    record = ekd_jax.export_student(
        student_of(), tmp_path / "out", ("html",), some_digits(), onnxruntime_web=RUNTIME
    )
    (written,) = record.exported
    assert written.files == ("student.html",)
    assert written.runtime.startswith("onnxruntime ")
    assert "no Chromium was found to open the page" in written.runtime
    assert written.difference < 1e-5


@pytest.mark.parametrize(
    ("package", "files", "message"),
    [
        (None, (), "which is not in {path}: npm install onnxruntime-web"),
        ("{", (), r"package.json cannot be read .*npm install"),
        ("[]", (), r"package.json cannot be read .*npm install"),
        ('{"name": "react", "version": "19.0.0"}', (), "is the package react, not onnxruntime-web"),
        (
            '{"name": "onnxruntime-web", "version": "1.14.0"}',
            (),
            rf"\(version 1.14.0\) has no {SCRIPT} .*@latest",
        ),
        (
            '{"name": "onnxruntime-web", "version": "1.30.0"}',
            (SCRIPT, WASM),
            r"\(version 1.30.0\) is damaged",
        ),
    ],
)
def test_another_package_is_one_line(package, files, message, tmp_path):
    if package is not None:
        (tmp_path / "package.json").write_text(package)
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=message.format(path=re.escape(str(tmp_path)))) as error:
        find_onnxruntime_web(tmp_path)
    assert "\n" not in str(error.value)


def test_the_directory_above_the_package_is_named(tmp_path):
    (tmp_path / "node_modules" / "onnxruntime-web").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did you mean .*/node_modules/onnxruntime-web\?"):
        find_onnxruntime_web(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=html", "--onnxruntime_web=nowhere"], "not in nowhere: npm install onnxruntime-web"),
        (["--format=onnx", "--onnxruntime_web=nowhere"], "--onnxruntime_web belongs to --format=html"),
        (["--format=html", "--with_preprocessing"], "leave out --with_preprocessing"),
        (
            ["--format=onnx", "--student=1,2"],
            "--format=onnx takes one student: name one; --format=html takes",
        ),
        (["--format=onnx,html", "--student=all"], "--format=onnx takes one student"),
    ],
)
def test_mistakes_get_one_line_and_nothing_is_written(flags, message, tmp_path):
    done = command("export", "--workdir=run", f"--output={tmp_path}/out", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@needs_runtime
@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("1,1", "--student=1,1 names 1 twice"),
        ("1,3", "has students 1 to 2"),
        ("1,x", "--student=x must be the number"),
    ],
)
def test_students_that_a_run_does_not_have(student, message, finished, tmp_path):
    flags = ["--format=html", f"--student={student}", f"--onnxruntime_web={RUNTIME}"]
    done = command("export", f"--workdir={finished[0]}", *flags, f"--output={tmp_path}/out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("change", "background"), [(lambda images: images, 0), (lambda images: 255 - images, 255)]
)
def test_the_form_of_digits_is_measured(change, background):
    """The UCI digits: 32 x 32 bitmaps of a box of 20 x 32, counted in blocks of 4 x 4."""
    form = measure_drawings(change(some_digits()))
    assert (form.background, form.ink) == (background, 255 - background)
    assert form.height == pytest.approx(8, abs=0.1)
    assert form.width == pytest.approx(5, abs=0.2)
    assert form.center == pytest.approx((4, 4), abs=0.1)
    assert form.most_stretch > 1
    assert not form.by_mass


def test_the_form_of_mnist_is_measured():
    """Digits of several proportions in a box of 20 x 20, whose center of mass is that of 28 x 28 pixels."""
    images = []
    for high, wide in [(20, 4), (20, 12), (20, 20)] * 20:
        ink = np.zeros((60, 60), np.uint8)
        ink[20 : 20 + high, 20:23] = ink[20:23, 20 : 20 + wide] = 255  # a corner
        y, x = (int(np.round(axis.mean())) for axis in np.nonzero(ink))
        images.append(ink[y - 14 : y + 14, x - 14 : x + 14])
    form = measure_drawings(np.stack(images)[..., None])
    assert (form.height, form.width) == (20, 20)
    assert 2.4 < form.stroke <= 3, "ends count as outline"
    assert (form.most_stretch, form.by_mass) == (1, True)
    assert form.center == pytest.approx((14, 14), abs=0.6)


def test_other_images_take_no_drawings():
    photos = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 1), dtype=np.uint8)
    assert measure_drawings(photos) is None
    assert measure_drawings(np.zeros((5, 8, 8, 1), np.uint8)) is None
    assert measure_drawings(np.repeat(some_digits(), 3, -1)) is None


# ---- in a browser


def test_colors_of_texts_and_of_focus_stand_out_from_the_page():
    """WCAG 2, level AA: 4.5 for text; the accent is also that of links in the report."""
    sheet = (pathlib.Path(ekd_jax.__file__).parent / "students/formats/page/page.css").read_text()
    schemes = sheet.partition("@media (prefers-color-scheme: dark)")
    for text in (schemes[0], schemes[2]):
        colors = dict(re.findall(r"--(\w+): (#\w{6})", text))
        for name in ("text", "quiet", "accent", "problem"):
            for ground in ("paper", "card"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)


@needs_runtime
@needs_browser
def test_logits_are_those_of_python(browser, students):
    images = np.random.default_rng(2).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    found = np.array(browser.evaluate(f"ekd.logits('{as_base64(images)}')")).reshape(2, 9, 10)
    for student, own in zip(students, found, strict=True):
        expected = np.asarray(student.logits(images))
        np.testing.assert_allclose(own, expected, atol=1e-5 * expected.std())


@needs_runtime
@needs_browser
def test_nothing_is_requested_and_nothing_fails(browser):
    browser.evaluate("ekd.measured")
    urls = {
        e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"
    }
    assert {url.partition(":")[0] for url in urls} <= {"file", "blob", "data"}
    assert sum(url.startswith("file:") for url in urls) == 1
    assert not [e for e in browser.events if e["method"] == "Log.entryAdded"]
    with pytest.raises(BrowserError):
        browser.evaluate("fetch('http://127.0.0.1:9/')")
    assert "Refused" in str(browser.events) or "violates" in str(browser.events), "the page's own policy"
    assert re.fullmatch(
        r"[\d.]+ ms", browser.evaluate("document.querySelector('dd:last-child').textContent")
    )


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def draw_pixels(*shape, seed=0):
    """Return smooth pixels with all values, so that a difference of rounding shows."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, *shape[2:]), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(shape[1::-1], Image.Resampling.BICUBIC))


FILES = {
    "smaller": encoded(draw_pixels(3, 2, 3)),
    "of the same size": encoded(draw_pixels(7, 5, 3)),
    "odd and larger": encoded(draw_pixels(53, 31, 3)),
    "long": encoded(draw_pixels(4, 301, 3)),
    "gray": encoded(draw_pixels(20, 33)),
    "transparent": encoded(draw_pixels(19, 23, 4)),
    "gray and transparent": encoded(draw_pixels(19, 23, 2)),
    "a palette": encoded(np.asarray(Image.fromarray(draw_pixels(19, 23, 3)).convert("P"))),
    "lossless WebP": encoded(draw_pixels(21, 18, 3), "WEBP", lossless=True),
    "JPEG": encoded(draw_pixels(41, 32, 3), "JPEG", quality=95, subsampling=0),
    **{
        f"turned {k}": encoded(draw_pixels(20, 12, 3), "JPEG", subsampling=0, **turned(k))
        for k in (2, 6, 7, 8)
    },
}


FITTED = """async (text, options) => {
  const file = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
  return Array.from(ekd.fit(await ekd.decode(file, "a file"), options).data);
}"""


@needs_runtime
@needs_browser
@pytest.mark.parametrize(
    ("shape", "fit"), [((7, 5, 3), "stretch"), (COLOR, "crop"), ((8, 8, 1), "stretch")]
)
def test_pixels_are_those_of_python(browser, shape, fit, tmp_path):
    student = student_of(shape, fit)
    for name, content in FILES.items():
        (tmp_path / "image").write_bytes(content)
        expected = read_image(tmp_path / "image", student)[0].astype(int)
        options = json.dumps({"shape": shape, "crop": fit == "crop"})
        found = browser.evaluate(f"({FITTED})('{base64.b64encode(content).decode()}', {options})")
        # Decoders of JPEGs may round differently, and a gray one is decoded without its colors.
        allowed = 1 if "JPEG" in name or "turned" in name else 0
        np.testing.assert_allclose(np.reshape(found, shape), expected, atol=allowed, err_msg=name)


@needs_runtime
@needs_browser
def test_resizing_is_pillows_for_many_sizes(browser):
    draws = np.random.default_rng(3)
    for _ in range(25):
        (h, w), (height, width) = draws.integers(1, 90, 2), draws.integers(1, 40, 2)
        pixels = draws.integers(0, 256, (h, w, 3), dtype=np.uint8)
        expected = Reader((int(height), int(width), 3), "stretch")._read(encoded(pixels), None)
        image = f"{{height: {h}, width: {w}, channels: 3, data: {pixels.ravel().tolist()}}}"
        found = browser.evaluate(f"Array.from(ekd.fit({image}, {{shape: [{height}, {width}, 3]}}).data)")
        np.testing.assert_array_equal(np.reshape(found, (height, width, 3)), expected)


@needs_runtime
@needs_browser
def test_a_drawing_has_the_form_of_the_data_set(browser):
    form = browser.evaluate("ekd.facts.drawings")

    def rendered(strokes, **changes):
        shape = [28, 28] if changes else [8, 8]
        data = browser.evaluate(
            f"Array.from(ekd.render({strokes}, {json.dumps(form | changes)}, {shape}).data)"
        )
        return np.reshape(data, (*shape, 1)).astype(np.uint8)

    corner = [[[100, 100], [100, 400], [300, 400]]]
    image = rendered(corner)[..., 0]
    assert image[0].max() > 100, "from the top"
    assert image[-1].max() > 200, "to the bottom"
    assert np.flatnonzero(image.max(0) > 60).tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(
        rendered([[[10, 10], [10, 40], [30, 40]]])[..., 0], image, "of any size, anywhere"
    )
    assert rendered([[[5, 5]]]).sum() > 255, "a dot"
    like_mnist = dict(height=20, width=20, stroke=2, most_stretch=1, by_mass=True, center=[14, 14])
    image = rendered(corner, **like_mnist)[..., 0].astype(float)
    y, x = ((image * (axis + 0.5)).sum() / image.sum() for axis in np.mgrid[:28, :28])
    assert (y, x) == pytest.approx((14, 14), abs=0.1)
    inverse = rendered(corner, **like_mnist, background=255, ink=0)[..., 0]
    np.testing.assert_allclose(255 - image, inverse, atol=1)


def mouse(browser, kind, x, y):
    browser.send(
        "Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1
    )


@needs_runtime
@needs_browser
def test_what_a_user_does(browser):
    """Draws, clicks on a test image, drops something else, and clears."""
    answers = "[...document.querySelectorAll('.answer b')].map(b => b.textContent)"
    left, top, width = browser.evaluate(
        "(r => [r.left, r.top, r.width])(document.getElementById('stage').getBoundingClientRect())"
    )
    mouse(browser, "Pressed", left + width / 3, top + width / 4)
    mouse(browser, "Moved", left + width / 2, top + width / 2)
    mouse(browser, "Released", left + width / 2, top + width / 2)
    browser.evaluate("ekd.settled()")
    drawn = browser.evaluate(answers)
    assert len(drawn) == 2
    browser.evaluate("document.querySelector('#examples button').click()")
    browser.evaluate("ekd.settled()")
    pixels = as_base64(some_digits()[:1])
    logits = np.array(browser.evaluate(f"ekd.logits('{pixels}')"))
    names = browser.evaluate("ekd.facts.classes")
    assert browser.evaluate(answers) == [names[k] for k in logits.argmax(1)]
    shown = browser.evaluate("document.querySelector('.answer span').textContent")
    powers = np.exp(logits[0] - logits[0].max())
    assert shown == f"{100 * powers.max() / powers.sum():.1f} %"
    browser.evaluate(
        "(t => { t.items.add(new File(['text'], 'notes.txt'));"
        " dispatchEvent(new DragEvent('drop', {dataTransfer: t, cancelable: true})) })(new DataTransfer())"
    )
    problem = "document.getElementById('problem')"
    browser.evaluate(
        f"new Promise(go => {{ const look = () => {problem}.hidden ? setTimeout(look, 5) : go(); look() }})"
    )
    assert browser.evaluate(f"{problem}.textContent").startswith(
        "notes.txt is not an image that this browser can read"
    )
    assert browser.evaluate(answers) == []
    browser.evaluate("document.getElementById('clear').click()")
    assert browser.evaluate(f"{problem}.hidden")


@needs_runtime
@needs_browser
def test_a_damaged_page_says_so_in_one_line(page, tmp_path):
    start = page.index(b'id="packed-network-1">') + 22
    (tmp_path / "damaged.html").write_bytes(
        page[:start] + base64.b64encode(b"no network") + page[start + 16 :]
    )
    with chromium(find_chromium()) as opened:
        opened.open(tmp_path / "damaged.html")
        with pytest.raises(BrowserError):
            opened.evaluate("ekd.ready")
        said = opened.evaluate("document.getElementById('problem').textContent")
    assert said.startswith("The networks do not start in this browser")


@needs_runtime
@needs_browser
def test_the_command_compares_in_the_browser(finished, tmp_path):
    flags = [
        "--format=html",
        "--student=2,ensemble",
        f"--onnxruntime_web={RUNTIME}",
        f"--output={tmp_path}/out",
    ]
    done = command("export", f"--workdir={finished[0]}", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("50 of 50 images in the same class by onnxruntime-web") == 2
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["network"] == "student 2, the ensemble"
    assert list(record["facts"]["networks"]) == ["student 2", "the ensemble"]
    assert [each["network"] for each in record["exported"]] == ["student 2", "the ensemble"]
    assert all(each["difference"] < 1e-4 for each in record["exported"])


@needs_runtime
@needs_browser
def test_color_and_half_precision(tmp_path):
    """No drawing, three channels."""
    network = exportable_student(student_of(COLOR, "crop"))
    images = np.random.default_rng(1).integers(0, 256, (8, *COLOR), dtype=np.uint8)
    options = Options("float16", onnxruntime_web=RUNTIME)
    record = exported(network, ["html"], tmp_path / "out", images, options)
    assert record.exported[0].same_class == 8
    assert 1e-5 < record.exported[0].difference < 1e-2
    assert facts_of((tmp_path / "out" / "student.html").read_bytes())["drawings"] is None
