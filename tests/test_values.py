"""Values that are not values: whatever a knob is set to, it is taken or refused in one line."""

import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ekd_jax.common.errors import UserError
from ekd_jax.config.knobs import KNOBS, all_knobs
from ekd_jax.config.resolve import fingerprint, resolve, to_dict
from ekd_jax.data.opening import facts
from ekd_jax.methods import list_methods

EXAMPLES = int(os.environ.get("EKD_JAX_EXAMPLES", 60))  # of each property; more of them for a long search


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("model.name", "²", "must be one of"),
        ("model.name", "x" * 5000, "must be one of"),
        ("train.epochs", math.inf, "must be a finite number"),
        ("train.epochs", math.nan, "must be a finite number"),
        ("train.epochs", 1e300, "at most 1,000,000"),
        ("train.evaluate_every_epochs", math.inf, "must be a finite number"),
        ("train.checkpoint_every_epochs", 1e12, "at most 1,000,000"),
        ("optimizer.learning_rate", math.inf, "must be a finite number"),
        ("optimizer.learning_rate", -0.1, "must be above 0"),
        ("optimizer.milestones", (0.5, math.nan), "must be a finite number"),
        ("data.mean", (math.nan,), "must be a finite number"),
        ("data.std", (math.inf,), "must be a finite number"),
        ("data.std", (0.0,), "must be above 0"),
        ("seed", 10**23, "must be at most 2,147,483,647"),
        ("train.batch_size", 10**12, "must be at most 2,147,483,647"),
        ("data.workers", 10**6, "must be from -1 to 1000"),
        ("data.image_size", 10**6, "must be from 0 to 4096"),
        ("model.dropout", -0.5, "must be -1, or at least 0 and below 1"),
        ("model.students", 10**9, "1 to 100 of them"),
        ("model.students", 0, "1 to 100 of them"),
        ("model.students", True, "must be a number"),
        ("model.students", (1,) * 101, "at most 100"),
        ("model.students", ("vgg8:1/0",), "width '1/0' is not a number above 0"),
        ("model.students", ("vgg8:",), "width '' is not a number above 0"),
        ("model.students", ("vgg8:-1",), "width '-1' is not a number above 0"),
        ("model.students", ("vgg8:1e999999999",), "is not a number above 0"),
        ("model.students", (math.nan,), "is not a number above 0"),
        ("model.students", (math.inf, 1), "is not a number above 0"),
        ("model.students", (1, 1000), "at most 64"),
        ("model.students", ((1, [2]),), "is not a number above 0"),
        ("model.students", ((),), "a student has 1 to 100 widths, not 0"),
        ("model.students", (None,), "width 'None' is not a number above 0"),
        ("data.name", "²", "data.name=²"),
        ("train.batch_size", True, "must be of type int"),
        ("train.epochs", "many", "must be of type float"),
        ("imports", ("",), "needs the module ''"),
        ("imports", None, "must be of type str"),
        ("imports", (5,), "must be of type str"),
        ("method.name", ["oem"], "must be of type str"),
        ("method.name", None, "must be of type str"),
        ("imports", (".x",), "needs the module '.x'"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_right(knob, value, message):
    section, _, name = knob.rpartition(".")
    asked = {"data": {"name": "digits"}}
    (asked.setdefault(section, {}) if section else asked)[name] = value
    with pytest.raises(UserError) as error:
        facts(resolve(asked))
    said = str(error.value)
    assert message in said
    assert knob in said
    assert "\n" not in said
    assert len(said) < 1500


NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2**31 - 1, 2**31, 10**23, 0.5, 1e-300, math.inf, -math.inf, math.nan])
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", "²", "1/0", "vgg8:1/0", "nan", "auto", "none", "\n", "\0"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(TEXTS, inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=EXAMPLES * 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_of_any_knob(data):
    """It is refused in one line, or the configuration is complete and says the same after it was stored."""
    method = data.draw(st.sampled_from(list_methods()))
    knob = data.draw(st.sampled_from(sorted(all_knobs(method))))
    value = data.draw(VALUES)
    section, _, name = knob.rpartition(".")
    asked = {"method": {"name": method}}
    if section:
        asked[section] = {**asked.get(section, {}), name: value}
    else:
        asked[name] = value
    try:
        config = resolve(asked)
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 1500
    else:
        stored = resolve(to_dict(config))
        assert fingerprint(stored) == fingerprint(config)


@pytest.mark.parametrize("knob", sorted(KNOBS))
def test_defaults_are_possible(knob):
    KNOBS[knob].check(knob, KNOBS[knob].default)
