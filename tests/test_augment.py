"""Augmentation equals PIL and plain NumPy exactly, and is a function of key and example alone."""

import collections
import itertools
import math
import os
import pathlib
import tarfile
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from ekd_jax.common import parallel
from ekd_jax.data import augment as augmentation
from ekd_jax.data import policies
from ekd_jax.data.augment import augment, cutout, mixup, normalize, smooth_labels, training_batch

KEY = jax.random.key(0)
MANUAL = os.environ.get("EKD_JAX_MANUAL_DIR", "")
DIGITS = pathlib.Path(augmentation.__file__).with_name("digits.npz")
EVERYTHING = {
    "crop_padding": 3,
    "padding_mode": "reflect",
    "rotation": 20.0,
    "flip": True,
    "policy": "randaugment",
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "cutout": 5,
    "mixup": 1.0,
    "label_smoothing": 0.1,
}


def knobs(**changes):
    """Return a section `data` of a configuration in which everything but `changes` is off."""
    changes = {"crop_padding": 0, "flip": False} | changes
    return tiny_config(**{f"data__{name}": value for name, value in changes.items()}).data


@partial(jax.jit, static_argnames="data")
def augmented(key, images, examples, data):
    return augment(key, images, examples, data)


# --- images ----------------------------------------------------------------------------------


def digits(number):
    """(number, 8, 8, 1) uint8."""
    with np.load(DIGITS) as file:
        return np.round(file["images"][:number, ..., None] * (255 / 16)).astype(np.uint8)


def colors(number):
    """(number, 24, 32, 3) uint8: digits in front of gradients and noise, some dull, dark or plain."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:24, :32] / 32
    slopes = generator.uniform(-150, 150, (2, number, 1, 1, 3))
    pictures = 128 + slopes[0] * (y - 0.4)[..., None] + slopes[1] * (x - 0.5)[..., None]
    pictures += generator.normal(0, 8, pictures.shape)
    pictures += generator.uniform(-1, 1, (number, 1, 1, 3)) * np.tile(digits(number), (1, 3, 4, 1))
    pictures[1::7] = 100 + 0.2 * (pictures[1::7] - 100)
    pictures[2::7] *= 0.3
    pictures[3::7] = generator.integers(0, 2, (1, 1, 1, 3)) * 90 + 60
    return np.clip(pictures, 0, 255).astype(np.uint8)


@cache
def cifar(number):
    """(number, 32, 32, 3) uint8, from CIFAR-10."""
    with tarfile.open(pathlib.Path(MANUAL) / "cifar-10-binary.tar.gz") as archive:
        batch = next(member for member in archive if member.name.endswith(".bin"))
        records = np.frombuffer(archive.extractfile(batch).read(number * 3073), np.uint8)
    return records.reshape(number, 3073)[:, 1:].reshape(number, 3, 32, 32).transpose(0, 2, 3, 1)


IMAGES = [
    digits,
    colors,
    pytest.param(
        cifar,
        marks=pytest.mark.skipif(
            not MANUAL, reason="EKD_JAX_MANUAL_DIR names no folder with the CIFAR archives"
        ),
    ),
]


def to_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pil(image):
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


# --- crop, flip, rotation --------------------------------------------------------------------


@pytest.mark.parametrize(("padding", "flip", "mode"), [
    (0, True, "zero"),
    (1, False, "zero"),
    (4, False, "reflect"),
    (4, True, "zero"),
    (4, True, "reflect"),
])  # fmt: skip
def test_a_padded_crop_and_a_flip(padding, flip, mode):
    """Every result is one of NumPy's crops and flips, and all of them are equally frequent."""
    number = 1600
    images = np.random.default_rng(0).integers(1, 255, (number, 10, 10, 3), dtype=np.uint8)
    data = knobs(crop_padding=padding, flip=flip, padding_mode=mode)
    found = np.asarray(augmented(KEY, images, np.arange(number), data))
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    margin = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(images, margin, "constant" if mode == "zero" else "reflect")
    offsets = range(2 * padding + 1)
    fits = np.stack([
        (padded[:, top : top + 10, left : left + 10][:, :, ::direction] == found).all((1, 2, 3))
        for top, left, direction in itertools.product(offsets, offsets, (1, -1)[: 1 + flip])
    ])  # fmt: skip
    assert (fits.sum(0) == 1).all()
    assert stats.chisquare(fits.sum(1)).pvalue > 1e-3


@pytest.mark.parametrize("most", [10.0, 180.0])
@pytest.mark.parametrize("images", IMAGES)
def test_rotation_is_pils(images, most):
    """Every result is PIL's at one of 1001 equally likely angles."""
    image = images(3)[2]
    found = np.asarray(augmented(KEY, np.tile(image, (600, 1, 1, 1)), np.arange(600), knobs(rotation=most)))
    turns = [from_pil(to_pil(image).rotate(angle)).tobytes() for angle in np.linspace(-most, most, 1001)]
    expected = collections.Counter(turns)  # small angles share an image
    drawn = collections.Counter(result.tobytes() for result in found)
    assert set(drawn) <= set(expected)
    surplus = np.cumsum([drawn[turn] / 600 - count / 1001 for turn, count in expected.items()])
    assert abs(surplus).max() < 1.95 / math.sqrt(600)  # Kolmogorov and Smirnov's bound, p = 0.001


def test_order_is_pad_rotate_crop_flip_policy():
    """Each operation gets the result of the one before, and none changes the draws of the others."""
    images, numbers = colors(40), np.arange(40) * 7
    rest = {"flip": True, "policy": "trivialaugment"}
    whole = augmented(KEY, images, numbers, knobs(crop_padding=4, rotation=20.0, **rest))
    geometry = augmented(KEY, images, numbers, knobs(crop_padding=4, rotation=20.0))
    flipped = augmented(KEY, geometry, numbers, knobs(flip=True))
    np.testing.assert_array_equal(augmented(KEY, flipped, numbers, knobs(policy="trivialaugment")), whole)

    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rotated = augmented(KEY, padded, numbers, knobs(rotation=20.0))
    places = np.arange(32 * 40, dtype=np.int32).reshape(1, 32, 40, 1).repeat(40, 0)  # in the padded image
    cropped = augmented(KEY, places[:, 4:-4, 4:-4], numbers, knobs(crop_padding=4))
    for turned, crop, found in zip(np.asarray(rotated), np.asarray(cropped), geometry, strict=True):
        y, x = np.argwhere(crop[..., 0])[0]
        top, left = np.subtract(divmod(crop[y, x, 0], 40), (y, x))
        np.testing.assert_array_equal(turned[top : top + 24, left : left + 32], found)


# --- policies --------------------------------------------------------------------------------


def magnitudes(policy, height, width):
    """Name -> (31 magnitudes, whether they have a sign), as torchvision's `_augmentation_space` has them.

    torch.linspace differs in the last bit between processors; this is the exact number's float32.
    """
    wide = policy == "trivialaugment"
    line = lambda first, last: [float(m) for m in np.linspace(first, last, 31, dtype=np.float32)]
    bits = [8 - round(level / (30 / (6 if wide else 4))) for level in range(31)]
    return {
        "Identity": ([0.0] * 31, False),
        "ShearX": (line(0, 0.99 if wide else 0.3), True),
        "ShearY": (line(0, 0.99 if wide else 0.3), True),
        "TranslateX": (line(0, 32 if wide else 150 / 331 * width), True),
        "TranslateY": (line(0, 32 if wide else 150 / 331 * height), True),
        "Rotate": (line(0, 135 if wide else 30), True),
        **dict.fromkeys(
            ("Brightness", "Color", "Contrast", "Sharpness"), (line(0, 0.99 if wide else 0.9), True)
        ),
        "Posterize": (bits, False),
        "Solarize": (line(255, 0), False),
        "AutoContrast": ([0.0] * 31, False),
        "Equalize": ([0.0] * 31, False),
    }


def by_pil(name, image, magnitude):
    """Return torchvision's result for a PIL image (`_apply_op`), without torchvision."""

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    slope = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    match name:
        case "Identity":
            return image
        case "ShearX":
            return affine(1, slope, 0, 0, 1, 0)
        case "ShearY":
            return affine(1, 0, 0, slope, 1, 0)
        case "TranslateX":
            return affine(1, 0, -int(magnitude), 0, 1, 0)
        case "TranslateY":
            return affine(1, 0, 0, 0, 1, -int(magnitude))
        case "Rotate":
            return image.rotate(magnitude, Image.Resampling.NEAREST)
        case "Posterize":
            return ImageOps.posterize(image, int(magnitude))
        case "Solarize":
            return ImageOps.solarize(image, magnitude)
        case "AutoContrast" | "Equalize":
            return getattr(ImageOps, name.lower())(image)
        case _:
            return getattr(ImageEnhance, name)(image).enhance(1 + magnitude)


def possible(policy, image):
    """Return torchvision's result for `image` (H, W, C) by (name, level, negative)."""
    return {
        (name, level, negative): from_pil(by_pil(name, to_pil(image), -m if negative else m))
        for name, (levels, signed) in magnitudes(policy, *image.shape[:2]).items()
        for level, m in enumerate(levels)
        for negative in (0, 1)[: 1 + signed]
    }


def strengths(policy, height, width):
    wide = policy == "trivialaugment"
    space = policies.TRIVIALAUGMENT_SPACE if wide else policies.randaugment_space(height, width)
    return policies.tabulate(space, height, width)


@partial(jax.jit, static_argnames="policy")
def applied(images, operations, levels, negatives, policy):
    one = partial(policies.apply, strengths=strengths(policy, *images.shape[1:3]))
    return jax.vmap(one)(images, operations, levels, negatives)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
@pytest.mark.parametrize("images", IMAGES)
def test_every_operation_at_every_level_is_pils(images, policy):
    images = images(12)
    asked, expected = [], []
    for place, image in enumerate(images):
        for i, ((name, level, negative), result) in enumerate(possible(policy, image).items()):
            if i % 3 == place % 3:  # four images for each
                asked.append((place, policies.OPERATIONS.index(name), level, negative))
                expected.append(result)
    places, operations, levels, negatives = np.array(asked).T
    found = np.asarray(applied(images[places], operations, levels, negatives, policy))
    differing = (found != np.stack(expected)).any((1, 2, 3))
    assert not differing.any(), {policies.OPERATIONS[i] for i in operations[differing]}
    assert set(operations) == set(range(14))
    assert set(levels) == set(range(31))


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_every_two_grays_are_mixed_as_pil_mixes_them(policy):
    first, second = np.mgrid[:256, :256].astype(np.uint8)[..., None]
    signed = np.array(magnitudes(policy, 1, 1)["Color"][0])[:, None] * [1, -1]
    blend = jax.jit(jax.vmap(policies._blend, (None, None, 0)))
    products = strengths(policy, 1, 1).products.reshape(62, 511)
    found = np.asarray(blend(first.astype(np.int32), second, products))
    for mixed, magnitude in zip(found, signed.ravel(), strict=True):
        expected = Image.blend(to_pil(first), to_pil(second), 1 + magnitude)
        np.testing.assert_array_equal(mixed, from_pil(expected))


def test_autocontrast_between_every_two_grays_is_pils():
    """PIL's double precision falls just short of an integer now and then, and so do we."""
    bounds = np.array(list(itertools.combinations_with_replacement(range(256), 2))[:32895]).reshape(
        -1, 3, 2
    )
    grays = np.clip(np.arange(256)[:, None], bounds[:, None, :, 0], bounds[:, None, :, 1])
    images = grays.reshape(-1, 16, 16, 3).astype(np.uint8)
    operation = np.full(len(images), policies.OPERATIONS.index("AutoContrast"))
    found = np.asarray(applied(images, operation, operation, operation * 0, "trivialaugment"))
    expected = np.stack([ImageOps.autocontrast(Image.fromarray(image)) for image in images])
    np.testing.assert_array_equal(found, expected)


def test_randaugment_takes_operations_one_after_another():
    """Two operations give PIL's result of two, with any operations and signs; all are equally likely."""
    image = colors(1)[0]
    once = {
        (name, negative): result
        for (name, level, negative), result in possible("randaugment", image).items()
        if level == 9
    }
    number = 1400
    images, numbers = np.tile(image, (number, 1, 1, 1)), np.arange(number)
    data = partial(knobs, policy="randaugment", policy_magnitude=9)
    names = {result.tobytes(): name for name, result in once.items()}
    assert len(names) == len(once)
    drawn = [
        names[r.tobytes()] for r in np.asarray(augmented(KEY, images, numbers, data(policy_operations=1)))
    ]
    counts = collections.Counter(name for name, _ in drawn)
    assert stats.chisquare([counts[name] for name in policies.OPERATIONS]).pvalue > 1e-3
    signs = np.array([negative for name, negative in drawn if (name, 1) in once])
    assert abs(signs.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(signs))

    twice = {
        from_pil(result).tobytes()
        for first in once.values()
        for (name, level, _), result in possible("randaugment", first).items()
        if level == 9
    }
    found = {r.tobytes() for r in np.asarray(augmented(KEY, images, numbers, data(policy_operations=2)))}
    assert found <= twice
    assert len(found) > 0.8 * len(twice)


def test_trivialaugment_takes_any_operation_at_any_level():
    image = colors(1)[0]
    results = collections.defaultdict(list)
    for choice, result in possible("trivialaugment", image).items():
        results[result.tobytes()].append(choice)
    number = 4000
    images = np.broadcast_to(image, (number, *image.shape))
    found = np.asarray(augmented(KEY, images, np.arange(number), knobs(policy="trivialaugment")))
    drawn = collections.Counter(result.tobytes() for result in found)
    assert set(drawn) <= set(results)
    assert len(drawn) > 0.95 * len(results)
    sure = [choices[0] for result in drawn.elements() if len(choices := results[result]) == 1]
    levels = [
        level for name, level, _ in sure if name in ("ShearX", "ShearY", "Color", "Contrast") and level
    ]
    assert stats.chisquare(np.bincount(levels, minlength=31)[1:]).pvalue > 1e-3


# --- cutout, mixup, labels -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 5, 30])
def test_cutout_is_a_square_around_any_pixel(size):
    height, width, number = 6, 9, 1000
    images = np.random.default_rng(0).uniform(1, 2, (number, height, width, 2)).astype(np.float32)
    found = np.asarray(jax.jit(cutout, static_argnums=3)(KEY, images, np.arange(number), size))
    counts = collections.Counter((found[..., 0] == 0)[i].tobytes() for i in range(number))
    masks = collections.Counter()
    for y, x in np.ndindex(height, width):
        top, left = y - size // 2, x - size // 2
        mask = np.zeros((height, width), bool)
        mask[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = True
        masks[mask.tobytes()] += 1
    assert set(counts) == set(masks)
    if len(masks) > 1:
        expected = np.array([masks[mask] for mask in counts]) * number / (height * width)
        assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-3
    np.testing.assert_array_equal(found, np.where(found[..., :1] == 0, 0, images))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_mixes_neighbors_by_a_beta_distribution(alpha):
    number = 2000
    generator = np.random.default_rng(0)
    images = generator.normal(size=(number, 3, 3, 2)).astype(np.float32)
    targets = np.eye(2, dtype=np.float32)[np.arange(number) % 2]  # no two neighbors of one class
    mixed, mixed_targets = jax.jit(mixup)(KEY, images, targets, np.arange(number), alpha)
    shares = np.asarray(mixed_targets)[np.arange(number), np.arange(number) % 2].astype(np.float64)
    expected = shares[:, None, None, None] * images
    expected += (1 - shares)[:, None, None, None] * images[(np.arange(number) + 1) % number]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    np.testing.assert_allclose(mixed_targets.sum(1), 1, atol=2e-7)
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert abs(shares.mean() - 0.5) < 4 * 0.5 / math.sqrt(number * (2 * alpha + 1))


def test_softened_labels():
    labels = np.array([2, 0, 4])
    expected = 0.7 * np.eye(5)[labels] + 0.3 / 5
    found = smooth_labels(labels, 5, 0.3)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-7)


def test_normalization():
    images = np.array([[[[0, 128, 255]]]], np.uint8)
    found = normalize(images, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    np.testing.assert_allclose(found[0, 0, 0], [-0.2, (128 / 255 - 0.2) * 4, 0.35], rtol=1e-6)


# --- the whole batch -------------------------------------------------------------------------


@partial(jax.jit, static_argnames="data")
def batch_of(key, images, labels, examples, data):
    return training_batch(key, images, labels, examples, 10, data)


def test_nothing_on_is_normalization_alone():
    images, labels = colors(16), np.arange(16) % 10
    found, targets = batch_of(KEY, images, labels, np.arange(16), knobs(mean=(0.5,), std=(0.2,)))
    # two programs may round a product and a sum once or twice
    np.testing.assert_allclose(found, jax.jit(normalize)(images, (0.5,), (0.2,)), rtol=3e-7)
    np.testing.assert_array_equal(targets, labels)
    assert jnp.issubdtype(targets.dtype, jnp.integer)


def test_a_batch_is_its_parts_in_order():
    images, labels, numbers = colors(16), np.arange(16) % 10, np.arange(16) * 3
    data = knobs(**EVERYTHING | {"policy": "none"})
    found, found_targets = batch_of(KEY, images, labels, numbers, data)
    expected = normalize(augmented(KEY, images, numbers, data), data.mean, data.std)
    expected = jax.jit(cutout, static_argnums=3)(KEY, expected, numbers, data.cutout)
    expected, targets = jax.jit(mixup)(KEY, expected, smooth_labels(labels, 10, 0.1), numbers, 1.0)
    # Float32 in one program or in several: the compiler may round once where two steps round twice.
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(found_targets, targets, atol=1e-6)
    np.testing.assert_allclose(found_targets.sum(1), 1, atol=1e-6)


def test_every_example_and_purpose_has_a_key_of_its_own():
    keys = [augmentation._keys(KEY, np.arange(100), purpose) for purpose in augmentation.Purpose]
    assert len({tuple(key) for key in np.asarray(jax.random.key_data(jnp.concatenate(keys)))}) == 100 * len(
        keys
    )


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_an_image_depends_on_key_and_example_alone(policy):
    images, labels, numbers = colors(24), np.arange(24) % 10, np.arange(24) * 7
    data = knobs(**EVERYTHING | {"policy": policy, "mixup": 0.0})
    found, targets = batch_of(KEY, images, labels, numbers, data)
    order = np.random.default_rng(1).permutation(24)
    shuffled = batch_of(KEY, images[order], labels[order], numbers[order], data)
    np.testing.assert_array_equal(shuffled[0], found[order])
    np.testing.assert_array_equal(shuffled[1], targets[order])
    for key, examples in ((jax.random.key(1), numbers), (KEY, numbers + 1)):
        other, _ = batch_of(key, images, labels, examples, data)
        assert (np.asarray(other) != found).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_one_and_eight_devices_give_the_same(policy):
    """The eight devices exchange nothing."""
    data = knobs(**EVERYTHING | {"policy": policy, "mixup": 0.0})
    batch = colors(24), np.arange(24) % 10, np.arange(24) * 7
    program = batch_of.lower(KEY, *split(batch, parallel.make_mesh()), data).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program.as_text()
    found = program(KEY, *split(batch, parallel.make_mesh()))
    assert len(found[0].sharding.device_set) == 8
    for eight, one in zip(found, batch_of(KEY, *batch, data), strict=True):
        np.testing.assert_array_equal(eight, one)


def test_mixup_on_one_and_eight_devices():
    """Their last bits differ: compilers round differently for vectors of other lengths."""
    data = knobs(mixup=1.0)
    batch = colors(24), np.arange(24) % 10, np.arange(24) * 7
    found = batch_of(KEY, *split(batch, parallel.make_mesh()), data)
    for eight, one in zip(found, batch_of(KEY, *batch, data), strict=True):
        np.testing.assert_allclose(eight, one, atol=3e-7)


def split(batch, mesh):
    return jax.device_put(batch, parallel.split(mesh))
