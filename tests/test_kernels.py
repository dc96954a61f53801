"""What a program launches and moves is read correctly from its text."""

import jax
import jax.numpy as jnp
import kernels
import pytest
from conftest import REFERENCE
from hlo import Module, flops
from jax import lax

# A program in the form that XLA writes for an H100: the loop over steps, in which a loop over blocks runs four times.
HLO = (REFERENCE / "step.hlo.txt").read_text()


def test_kernels_and_bytes_of_a_step_by_part():
    found = kernels.tally(HLO)
    state = 4 + 4 * 32 + 4 * 256
    assert found["parts"] == {
        "stacking of equal blocks": [
            4,
            4 * (4 * 64 + 4 + 4 * 64),
        ],  # reads a slice and its number, writes it
        "matrix products": [4, 4 * (4 * 64 + 4 * 8)],
        "activation": [4, 4 * (4 * 8 + 4 + 4 * 8)],  # in place: the new row alone
        "convolutions": [1, 3 * 2 * 32],
        "batch norm": [1, 2 * 32 + 4 * 16],
        "collectives": [1, 2 * 4 * 16],
        "casts and copies": [1, 2 * state],
    }, "what is before the loop over steps does not count"
    assert found["kernels"] == 16
    assert (found["collectives"], found["collective_bytes"]) == (1, 64)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(train_steps)/while/body/draw/vmap(jit(_uniform))/add", "random numbers"),
        ("jit(train_steps)/while/body/draw/gather", "augmentation"),
        ("jit(train_steps)/while/body/optimizer/mul", "optimizer"),
        ("jit(train_steps)/while/body/transpose(jvp(loss))/OEM/reduce_sum", "losses"),
        ("jit(train_steps)/while/body/transpose(jvp(Network))/stage1/jit(_where)/select_n", "activation"),
        ("jit(train_steps)/while/body/jvp(Network)/stage1/first/shortcut_bn/convert_element_type", "casts and copies"),
        ("jit(train_steps)/while/body/jvp(Network)/stage1/bn2/rsqrt", "batch norm"),
        ("jit(train_steps)/while/body/jvp(Network)/head/linear/dot_general", "matrix products"),
    ],
)  # fmt: skip
def test_the_part_of_a_kernel(name, part):
    line = f'  %x = f32[2]{{0}} fusion(%y), kind=kLoop, calls=%f, metadata={{op_name="{name}"}}'
    (own,) = Module(f"ENTRY %main () -> f32[] {{\n{line}\n}}").computations["main"].values()
    assert kernels.part(own) == part


def test_flops_of_convolutions_and_products_are_those_of_their_definition():
    def network(weights, head, x):
        first = lax.conv_general_dilated(
            x, weights[0], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

        def block(x, kernel):
            grouped = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=grouped, feature_group_count=2
            ), None

        x, _ = lax.scan(block, first, jnp.stack(weights[1:]))
        return (x.mean((1, 2)) @ head).sum()

    weights = [jnp.ones((3, 3, 4, 8)), *[jnp.ones((3, 3, 4, 8))] * 3]
    arguments = weights, jnp.ones((8, 10)), jnp.ones((2, 16, 16, 4))
    macs = 2 * 8 * 8 * 9 * 4 * 8  # of the first, and of each other: 8 in 2 groups
    forward = 2 * (4 * macs + 2 * 8 * 10)
    assert flops(jax.jit(network).lower(*arguments).as_text("hlo")) == forward
    # of the first there is no gradient by its input
    gradient = jax.jit(jax.value_and_grad(network, (0, 1))).lower(*arguments).as_text("hlo")
    assert flops(gradient) == 3 * forward - 2 * macs
