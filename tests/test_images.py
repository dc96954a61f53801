"""Image files of others: damaged, hostile or unusual ones give the right pixels, or one line that names them."""

import io
import os
import resource
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image, ImageOps

from ekd_jax.common.errors import UserError
from ekd_jax.data import decode as images
from ekd_jax.data import order
from ekd_jax.data.dataset import Example
from ekd_jax.data.decode import CorruptImageError, Reader, read_image_file
from ekd_jax.data.opening import open_data

DRAWS = order.crop_draws(0, 0)


def picture(height=12, width=17):
    """Return smooth colors, (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 250 // height, x * 250 // width, (x + y) * 250 // (height + width)], -1).astype(
        np.uint8
    )


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    """Run a test with each of the decoders."""
    if request.param == "Pillow":
        monkeypatch.setattr(images, "simplejpeg", None)
        monkeypatch.setattr(images, "cv2", None)


# --- damaged bytes ---------------------------------------------------------------------------


def seeds():
    """Return a small file of each kind."""
    rgb = Image.fromarray(picture())
    gray16 = Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    files = {
        "jpeg": saved(rgb, "jpeg"),
        "exif": saved(rgb, "jpeg", exif=exif(6)),
        "cmyk": saved(rgb.convert("CMYK"), "jpeg"),
        "png": saved(rgb, "png", exif=exif(3)),
        "png16": saved(gray16, "png"),
        "palette": saved(rgb.quantize(16), "png", transparency=3),
        "gif": saved(rgb, "gif", save_all=True, append_images=[rgb.rotate(90)]),
        "bmp": saved(rgb, "bmp"),
        "tiff": saved(rgb, "tiff", compression="tiff_lzw"),
        "tiff16": saved(gray16, "tiff"),
        "ppm": saved(rgb, "ppm"),
    }
    formats = images._formats()
    optional = {"webp": ("WEBP", {"exif": exif(6)}), "avif": ("AVIF", {}), "jp2": ("JPEG2000", {})}
    return files | {
        name: saved(rgb, kind, **options) for name, (kind, options) in optional.items() if kind in formats
    }


def mutated(file, generator):
    """Return a file with some bytes changed, and now and then cut off, with a part missing or twice."""
    content = bytearray(file)
    for _ in range(generator.integers(1, 8)):
        place = int(generator.integers(min(len(content), 60 if generator.random() < 0.5 else len(content))))
        content[place] = int(generator.choice([0, 1, 127, 128, 255, generator.integers(256)]))
    a, b = sorted(map(int, generator.integers(len(content), size=2)))
    match generator.integers(10):
        case 0:
            del content[a:]
        case 1:
            del content[a:b]
        case 2:
            content[a:a] = content[a:b]
    return bytes(content)


def fuzz(file, mutations, seed=0):
    """Read mutations of a file; return the messages of those refused, and the longest time in seconds."""
    generator = np.random.default_rng(seed)
    messages, longest = [], 0.0
    for number in range(mutations):
        content = mutated(file, generator)
        fit, draws = (("stretch", None), ("crop", None), ("crop", DRAWS))[number % 3]
        channels = 1 + 2 * (number % 2)
        started = time.monotonic()
        try:
            pixels = Reader((8, 8, channels), fit, max_pixels=10**5)(Example(content, 0, "a/b.jpg"), draws)
        except CorruptImageError as error:
            messages.append(str(error))
        else:
            assert (pixels.shape, pixels.dtype) == ((8, 8, channels), np.uint8)
        longest = max(longest, time.monotonic() - started)
    for message in messages:
        assert "a/b.jpg cannot be read (" in message
        assert "\n" not in message
        assert "object at 0x" not in message
    return messages, longest


@pytest.mark.parametrize("name", seeds())
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_pixels_or_one_line(name, decoder):
    """A longer run: `python tests/test_images.py 20000`."""
    messages, longest = fuzz(seeds()[name], 150)
    assert len(messages) > 5
    assert longest < 5


# --- sizes -----------------------------------------------------------------------------------


def claiming(kind, height, width):
    """Return a small file of a kind that claims to be of this size."""
    file = bytearray(saved(Image.fromarray(picture()), kind))
    match kind:
        case "jpeg":
            start = next(place for marker, place in images._segments(bytes(file)) if marker == 0xC0)
            file[start + 5 : start + 9] = struct.pack(">HH", height, width)
        case "png":
            file[16:24] = struct.pack(">II", width, height)
            file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
        case "bmp":
            file[18:26] = struct.pack("<ii", width, height)
        case "gif":
            file[6:10] = struct.pack("<HH", width, height)
        case "ppm":
            file[:] = file.replace(b"17 12", b"%d %d" % (width, height), 1)
    return bytes(file)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "gif", "ppm"])
@pytest.mark.parametrize(("fit", "draws"), [("stretch", None), ("crop", None), ("crop", DRAWS)])
def test_a_small_file_that_claims_billions_of_pixels(kind, fit, draws, decoder):
    """Its size is read from the header, and nothing is allocated."""
    file = claiming(kind, 65_500, 65_500)
    assert len(file) < 2500
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptImageError, match=r"a.jpg cannot be read \(.*178,956,970.*data.max_pixels"):
        Reader((8, 8, 3), fit)(Example(file, 0, "a.jpg"), draws)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000  # kB


@pytest.mark.parametrize("name", seeds())
@pytest.mark.parametrize(("fit", "draws"), [("stretch", None), ("crop", None), ("crop", DRAWS)])
def test_the_limit_is_exact(name, fit, draws, decoder):
    file = Example(seeds()[name], 0, "a.jpg")
    assert Reader((4, 4, 3), fit, max_pixels=12 * 17)(file, draws).shape == (4, 4, 3)
    with pytest.raises(CorruptImageError, match="it has (12x17|17x12) pixels, above the limit of 203"):
        Reader((4, 4, 3), fit, max_pixels=12 * 17 - 1)(file, draws)


def test_the_limit_can_be_raised_above_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    monkeypatch.setattr(images, "simplejpeg", None)
    file = Example(seeds()["jpeg"], 0, "a.jpg")
    with pytest.raises(CorruptImageError, match="it has more than 100 pixels"):
        Reader((4, 4, 3), "stretch", max_pixels=100)(file)
    assert Reader((4, 4, 3), "stretch", max_pixels=300)(file).shape == (4, 4, 3)


def test_the_limit_is_a_knob():
    assert Reader((8, 8, 1)).max_pixels == open_data(tiny_config()).reader.max_pixels == 2 * 89_478_485
    assert open_data(tiny_config(data__max_pixels=1000)).reader.max_pixels == 1000
    with pytest.raises(UserError, match="data.max_pixels=0 must be above 0"):
        tiny_config(data__max_pixels=0)


def test_an_image_too_long_and_narrow_for_a_center_crop():
    """Its short side would become 256 pixels, and the long one 25 millions."""
    file = Example(saved(Image.new("L", (100_000, 1)), "png"), 0, "a.png")
    with pytest.raises(
        CorruptImageError, match="a.png cannot be read .it is 1x100000, too long and narrow"
    ):
        Reader((224, 224, 3), "crop")(file)
    assert Reader((224, 224, 3), "crop")(file, DRAWS).shape == (224, 224, 3)
    assert Reader((224, 224, 3), "stretch")(file).shape == (224, 224, 3)


# --- color models ----------------------------------------------------------------------------

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def tiff(pixels, bits, photometric=1, order="<", sample_format=1):
    """Return an uncompressed gray TIFF with these bytes as pixels."""
    data = pixels.tobytes() if isinstance(pixels, np.ndarray) else pixels
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 16, 279: len(data)}
    tags[339] = sample_format
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + data


def packed_12_bits(values):
    a, b = values.ravel().astype(int).reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()


WIDE = RAMP.astype(np.uint16) * 257
GRAYS = {
    "L png": saved(Image.fromarray(RAMP), "png"),
    "L pgm": saved(Image.fromarray(RAMP), "ppm"),
    "LA png": saved(Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (16, 16), 7)]), "png"),
    "I;16 png": saved(Image.fromarray(WIDE), "png"),
    "I;16 tiff": tiff(WIDE.astype("<u2"), 16),
    "I;16B tiff": tiff(WIDE.astype(">u2"), 16, order=">"),
    "I;16 tiff, white is zero": tiff((65535 - WIDE).astype("<u2"), 16, photometric=0),
    "L tiff, white is zero": tiff(255 - RAMP, 8, photometric=0),
    "I;12 tiff": tiff(packed_12_bits(WIDE >> 4), 12),
    "I pgm": b"P5 16 16 65535\n" + WIDE.astype(">u2").tobytes(),
    "I pgm of 10 bits": b"P2 16 16 1023\n"
    + b" ".join(b"%d" % -(-v * 1023 // 255) for v in RAMP.ravel().tolist()),
}


@pytest.mark.parametrize("name", GRAYS)
def test_gray_images_of_any_depth(name, decoder):
    np.testing.assert_array_equal(images.decode(GRAYS[name], 1)[..., 0], RAMP)
    np.testing.assert_array_equal(images.decode(GRAYS[name], 3), RAMP[..., None].repeat(3, -1))


def test_black_and_white():
    bits = RAMP > 99
    for kind in ("png", "tiff", "bmp", "ppm"):
        found = images.decode(saved(Image.fromarray(bits), kind), 3)
        np.testing.assert_array_equal(found, bits[..., None].repeat(3, -1) * np.uint8(255))


def with_alpha(image):
    image.putalpha(Image.fromarray((np.indices(image.size[::-1]).sum(0) * 8).astype(np.uint8)))
    return image


def test_transparency_is_dropped():
    """The colors below it show, as with torchvision and timm: Pillow's convert("RGB")."""
    colors = Image.fromarray(picture())
    for kind in ("png", "tiff"):
        np.testing.assert_array_equal(
            images.decode(saved(with_alpha(colors.convert("RGBA")), kind), 3), picture()
        )
    palette = colors.quantize(16)
    for kind in ("png", "gif"):
        found = images.decode(saved(palette, kind, transparency=3), 3)
        np.testing.assert_array_equal(found, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "RGBX", "RGBA", "P", "1"])
def test_color_models_of_tiff(mode):
    image = Image.fromarray(picture()).convert(mode)
    np.testing.assert_array_equal(
        images.decode(saved(image, "tiff"), 3),
        np.asarray(Image.open(io.BytesIO(saved(image, "tiff"))).convert("RGB")),
    )
    if mode not in ("1", "P"):
        assert np.abs(images.decode(saved(image, "tiff"), 3).astype(int) - picture()).max() <= 3


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "HSV"])
def test_models_that_pillow_has_in_memory(mode):
    """No format above is opened with them today; a new version of Pillow may."""
    before = {"La": "LA", "RGBa": "RGBA", "PA": "P", "HSV": "HSV"}[mode]
    image = Image.fromarray(picture()).convert(before)
    image = image.convert(mode) if mode != "PA" else with_alpha(image)
    assert image.mode == mode
    found = np.asarray(images._with_8_bits(image).convert("RGB"))
    assert (
        np.abs(
            found.astype(int) - np.asarray(Image.fromarray(picture()).convert(before).convert("RGB"))
        ).max()
        < 2
    )


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (saved(Image.fromarray((RAMP / 255).astype(np.float32)), "tiff"), "floating-point numbers .*; save it with 8"),
        (saved(Image.fromarray(RAMP.astype(np.float32) * 99), "tiff"), "floating-point numbers"),
        (b"Pf 16 16 -1\n" + RAMP.astype(np.float32).tobytes(), "floating-point numbers"),
        (saved(Image.fromarray(RAMP.astype(np.int32)), "tiff"), "signed or 32-bit integers .*; save it with 8 bits"),
        (tiff(RAMP.astype("<u4"), 32), "signed or 32-bit integers"),
        (tiff(RAMP.astype("<i2"), 16, sample_format=2), "signed or 32-bit integers"),
        (saved(Image.new("LAB", (8, 8)), "tiff"), "color model is CIELAB; save it as RGB"),
        (b"", "it is empty"),
        (b"no image at all", "it is not an image of a format that is read: JPEG, PNG, GIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "it is not an image of a format"),
        (b"P6 0 5 255\n", "it is not an image of a format"),
        (b"P6 5 0 255\n", "it is not an image of a format"),
    ],
)  # fmt: skip
def test_images_that_are_refused(file, why, decoder):
    for fit, draws in (("stretch", None), ("crop", DRAWS)):
        with pytest.raises(CorruptImageError, match=rf"the image a.tif cannot be read.*{why}") as error:
            Reader((8, 8, 3), fit)(Example(file, 0, "a.tif"), draws)
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value)


def bomb(chunk):
    """Return a PNG with 100 MB of zeros in a compressed chunk."""
    head = {b"iCCP": b"x\0\0", b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0"}[chunk]
    body = chunk + head + zlib.compress(bytes(10**8), 9)
    file = seeds()["png"]
    return (
        file[:33]
        + struct.pack(">I", len(body) - 4)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + file[33:]
    )


@pytest.mark.parametrize("chunk", [b"iCCP", b"zTXt", b"iTXt"])
def test_compressed_texts_of_a_png_that_grow(chunk):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptImageError, match="a.png cannot be read"):
        Reader((8, 8, 3), "stretch")(Example(bomb(chunk), 0, "a.png"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000  # kB


# --- frames and orientation ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gif", "png", "tiff", "webp"])
def test_the_first_of_several_frames_is_read(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if kind == "webp" else {}
    found = images.decode(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options), 3)
    assert np.unique(found.reshape(-1, 3), axis=0).tolist() == [[200, 0, 0]]


@pytest.mark.parametrize("orientation", [0, *range(1, 11)])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_every_format_is_upright(kind, orientation, decoder):
    """An orientation that EXIF does not define counts as upright, as in Pillow."""
    if kind.upper() not in images._formats():
        pytest.skip(f"this Pillow reads no {kind}")
    options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {}
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "avif" else options
    if kind == "avif" and orientation not in range(1, 9):
        pytest.skip("AVIF has no others")
    file = saved(Image.fromarray(picture()), kind, exif=exif(orientation), **options)
    with Image.open(io.BytesIO(file)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert expected.shape[:2] == ((17, 12) if orientation in range(5, 9) else (12, 17))
    found = images.decode(file, 3)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 3
    assert images._size(file) == expected.shape[:2]


# --- files -----------------------------------------------------------------------------------


def test_only_regular_files_are_read(tmp_path):
    """A pipe and a device are refused at once; a link is as what it leads to."""
    (tmp_path / "a.png").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "link")):
        assert read_image_file(path) == b"content"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(3 * 2**30)
    started = time.monotonic()
    for path, why in {
        "pipe": "it is a pipe, a socket or a device", "to_pipe": "it is a pipe", "/dev/zero": "it is a pipe",
        "/dev/random": "it is a pipe", ".": "it is a directory", "missing": "No such file",
        "gone": "No such file", "loop": "symbolic links", "a.png/b": "Not a directory",
        "sparse.png": "3,221,225,472 bytes, above the limit of 2,147,483,648", "nul\0": "null", "x" * 999: "too long",
        "two\nlines\udcff": r"two\\nlines\\udcff cannot be read \(No such file",
    }.items():  # fmt: skip
        with pytest.raises(CorruptImageError, match=why) as error:
            read_image_file(os.path.join(tmp_path, path))
        assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5
    with pytest.raises(CorruptImageError, match="7 bytes, above the limit of 6"):
        read_image_file(tmp_path / "a.png", max_bytes=6)


@pytest.mark.parametrize(
    ("fit", "draws"), [("native", None), ("stretch", None), ("crop", None), ("crop", DRAWS)]
)
def test_pixels_of_other_types_are_refused(fit, draws):
    """Floating-point pixels of a registered set would become black."""
    with pytest.raises(CorruptImageError, match="mine 3 cannot be read .its pixels are float64, not uint8"):
        Reader((12, 17, 3), fit)(Example(picture() / 255, 0, "mine 3"), draws)


def test_a_memory_error_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(images, "decode", fail)
    with pytest.raises(CorruptImageError, match="it needs more memory than there is"):
        Reader((8, 8, 3))(Example(b"x", 0, "a.png"))


if __name__ == "__main__":
    import sys

    warnings.simplefilter("ignore")
    for name, file in seeds().items():
        messages, longest = fuzz(file, int(sys.argv[1]))
        print(f"{name}: {len(messages)} refused, at most {longest:.2f} s", flush=True)
