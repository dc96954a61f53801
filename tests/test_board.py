"""Images for TensorBoard: what the event file of a run holds, read without TensorBoard."""

import io
import struct
import sys

import pytest
from conftest import one_device, tiny_config
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from ekd_jax.config.resolve import resolve
from ekd_jax.runs.metrics import MetricWriter
from ekd_jax.training import board
from ekd_jax.training.board import BoardImages
from ekd_jax.training.setup import prepare


@pytest.fixture(scope="module")
def setup(finished):
    return prepare(resolve(tiny_config()), one_device(), finished[0])


def images_in(path):
    """Name -> (step, image) of all event files; a record is a length, a checksum, the event and a checksum."""
    found = {}
    for file in sorted(path.glob("events*")):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                if value.HasField("image"):
                    own = value.image
                    image = Image.open(io.BytesIO(own.encoded_image_string))
                    assert (image.format, image.size) == ("PNG", (own.width, own.height))
                    found[value.tag] = (event.step, image)
            place += length + 16
    return found


class Records(MetricWriter):
    """A writer of images into another directory than the run's, which other tests use."""

    def __init__(self, run, folder):
        super().__init__(folder, 0, 0)
        self.path = run


def test_figures_and_augmented_images_are_in_the_events(setup, finished, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[figures]'")
    writer = Records(finished[0], tmp_path)
    images = BoardImages(setup, writer)
    images.write(7)
    images.write(19)
    writer.close()
    found = images_in(tmp_path / "tensorboard")
    assert found["data/augmented"][0] == 7, "once"
    assert {"report/curves-test", "report/curves-loss_kd", "report/cost-parameters"} <= found.keys()
    assert all(step == 19 for name, (step, _) in found.items() if name.startswith("report/"))


def test_without_matplotlib_there_are_no_figures(setup, finished, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    writer = Records(finished[0], tmp_path)
    BoardImages(setup, writer).write(7)
    writer.close()
    assert [*images_in(tmp_path / "tensorboard")] == ["data/augmented"]
    assert not caplog.records


def test_what_cannot_be_drawn_ends_nothing(setup, finished, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(board, "draw_preview", lambda *_: 1 / 0)
    writer = Records(finished[0], tmp_path)
    BoardImages(setup, writer).write(7)
    writer.close()
    assert "no images for TensorBoard: division by zero" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "last", "drawn"),
    [(59, True, False), (61, True, True), (599, False, False), (601, False, True)],
)
def test_images_are_drawn_rarely(setup, tmp_path, monkeypatch, seconds, last, drawn):
    clock, written = [0.0], []
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(BoardImages, "write", lambda _, step: written.append(step))
    images = BoardImages(setup, MetricWriter(None, 0, 0))
    clock[0] = seconds
    images.after_evaluation(5, last)
    images.after_evaluation(6, False)
    assert written == [5] * drawn
