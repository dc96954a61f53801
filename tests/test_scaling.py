"""Collectives are read from a program correctly, and the training step exchanges what theory says."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
import scaling
from jax import lax
from jax.sharding import PartitionSpec as P

from ekd_jax.common import parallel

HLO = """HloModule forms, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (carry: (s32[], f32[4])) -> pred[] {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (carry.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry.1 = (s32[], f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %x = f32[4]{0} get-tuple-element(%carry.1), index=1
  %y = f32[4]{0:T(128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add, metadata={op_name="f/y"}
  ROOT %next = (s32[], f32[4]{0}) tuple(%i.1, %y)
}

%scatter (z: bf16[2,8]) -> bf16[8] {
  %z = bf16[2,8]{1,0} parameter(0)
  ROOT %part = bf16[8]{0} reduce-scatter(%z), dimensions={0}, to_apply=%add, metadata={op_name="f/scatter"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %q = bf16[2,8]{1,0} custom-call(%p), custom_call_target="q"
  %pair = (f32[4]{0}, /*index=1*/pred[3]{0}) all-reduce-start(%p, %q), metadata={op_name="f/(a:b)"}
  %pair.done = (f32[4]{0}, pred[3]{0}) all-reduce-done(%pair)
  %gather = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}, metadata={op_name="f/gather"}
  %gather.done = f32[16]{0} all-gather-done(%gather)
  %scattered = ((bf16[2,8]{1,0}), bf16[8]{0}, s32[]) async-start(%q), calls=%scatter
  %scattered.done = bf16[8]{0} async-done(%scattered), calls=%scatter
  %zero = s32[] constant(0)
  %first = (s32[], f32[4]{0}) tuple(%zero, %p)
  %loop = (s32[], f32[4]{0}) while(%first), condition=%condition, body=%body
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_every_form_of_a_collective_is_read():
    assert scaling.collectives_in(HLO) == [
        ("all-reduce", (("f/a", 16), ("f/b", 3)), 1),
        ("all-gather", (("f/gather", 64),), 1),
        ("reduce-scatter", (("f/scatter", 32),), 1),
        ("all-reduce", (("f/y", 16),), 7),
    ]


def test_collectives_in_loops_count_as_often_as_they_run():
    mesh = parallel.make_mesh()

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(parallel.AXES)), out_specs=P(parallel.AXES))
    def program(steps, x):
        total = partial(lax.psum, axis_name=parallel.AXES)

        def inner(x, _):
            return jnp.sin(x - total(x[:2]).sum()), None

        def outer(x, _):
            x, _ = lax.scan(inner, jnp.cos(x + total(x[:4]).sum()), length=5)
            return x, None

        def step(_, x):
            x, _ = lax.scan(outer, jnp.exp(x * total(x).sum()), length=3)
            return x

        return lax.fori_loop(0, steps, step, x)

    compiled = jax.jit(program).lower(jnp.int32(2), jnp.zeros(64)).compile()
    found = {arrays[0][1]: times for _, arrays, times in scaling.collectives_in(compiled.as_text())}
    assert found == {32: 1, 16: 3, 8: 15}  # bytes: times


@pytest.fixture(scope="module")
def measured():
    """Return the row of two students without loops on eight devices, by kind of batch norm."""
    settings = [
        scaling.Setting("resnet8", mode, 8, students=2, image_size=8) for mode in ("global", "local")
    ]
    return {setting.batch_norm: scaling.measure(setting) for setting in settings}


@pytest.mark.parametrize("mode", ["global", "local"])
def test_what_is_exchanged_is_what_theory_says(measured, mode):
    found, expected = measured[mode]["found"], measured[mode]["theory"]
    assert {why: own.bytes for why, own in found.items() if why != "metrics"} == {
        why: own.bytes for why, own in expected.items()
    }
    assert found["gradients"].collectives == 1
    # With global batch norm, its backward sums are the gradients of its scale and bias.
    trained = found["gradients"].bytes + found.get("batch norm backward", scaling.Tally()).bytes
    assert trained == 4 * measured[mode]["parameters"]
    assert found["metrics"].bytes < 100
    assert measured[mode]["run"] == measured[mode]["collectives"]


def test_global_batch_norm_exchanges_twice_per_layer_and_local_only_with_gradients(measured):
    found, expected = measured["global"]["found"], measured["global"]["theory"]
    for way in ("batch norm forward", "batch norm backward"):
        layers = expected[way].collectives
        assert layers == 18
        assert found[way].arrays == 2 * layers
        assert layers / 2 < found[way].collectives <= layers  # those of parallel layers are combined
    assert measured["local"]["collectives"] == 1  # running values are combined with the gradients
    assert not any("batch norm" in why for why in measured["local"]["found"])


@pytest.mark.slow
def test_scanned_blocks_and_other_numbers_of_devices():
    """The blocks of a scanned stage exchange one by one, for any number of devices."""
    settings = [scaling.Setting("resnet44", "local", n, students=1, image_size=8) for n in (2, 4)]
    two, four = map(scaling.measure, settings)
    assert two["found"] == four["found"]
    assert two["found"]["gradients"].bytes == 4 * two["parameters"]
    assert two["found"]["running statistics"].collectives == 18  # three stages of six scanned blocks
    assert two["in_loops"] == 36
    assert two["run"] == two["collectives"] == four["run"]


def test_prediction():
    chip = scaling.Chip(1e12, 4, 1e9, 2e9, 1, 1e-6, 1e-6, 5e-6)
    assert scaling.latency(chip, 4) == pytest.approx(1e-6 + 2 * 2e-6)
    assert scaling.latency(chip, 16) == pytest.approx(1e-6 + 2 * (2e-6 + 2 * 5e-6))
    assert scaling.transfer(chip, 4, 1e6) == pytest.approx(2 * 3 / 4 * 1e-3)
    assert scaling.transfer(chip, 16, 1e6) == pytest.approx(2 * 3 / 4 * (1e-3 + 0.5e-3))
    found = {"gradients": scaling.Tally(1, 1_000_000, 1), "batch norm forward": scaling.Tally(20, 0, 10)}
    step = scaling.predict(found, chip, 4, 0.01)
    assert step == pytest.approx((0.01, 5e-6 + 1.5e-3, 10 * 5e-6, 0))
    assert scaling.predict(found, chip, 1, 0.01) == (0.01, 0, 0, 0)
