"""Count what a compiled training step launches and moves, by part of the step, from the text of its program."""

import collections
import re
from collections.abc import Iterator
from typing import Any

from hlo import Instruction, Module, Running, sizes

# Instructions that need no kernel: they name memory, or end what another began.
FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|call|conditional|.*-done|after-all"
)
FREE_CALLS = ("Sharding", "AllocateBuffer", "AssumeGatherIndicesInBound")
COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(-start)?")
# The part of a kernel: the first whose pattern is found in the name of the operation.
PARTS = (
    ("random numbers", r"threefry|random|_keys|/bits|_uniform|_randint|_bernoulli|fold_in|rng"),
    ("augmentation", r"/draw/"),
    ("optimizer", r"/optimizer/"),
    ("losses", r"[/(]loss[/)]|/tally/"),
    ("batch norm", r"[/._]bn\d*/"),
    ("activation", r"/max$|jit\(_where\)/select_n$"),  # ReLU and its gradient
    ("stacking of equal blocks", r"/stage\d+/(concatenate|slice)"),
)


def kernels(module: Module) -> Iterator[Running]:
    """Yield the instructions of one step that a device launches, as often as they run."""
    for running in module.running():
        own = running.instruction
        free = own.op == "custom-call" and own.attribute("custom_call_target") in FREE_CALLS
        if running.uncounted and not free and not FREE.fullmatch(own.op):
            yield running


def part(own: Instruction) -> str:
    """Return the part of a training step that a kernel belongs to."""
    target = own.attribute("custom_call_target")
    if own.op == "convolution" or "conv" in target or "convolution" in own.op_name.rpartition("/")[2]:
        return "convolutions"
    if own.op == "dot" or "gemm" in target or own.op_name.endswith("dot_general"):
        return "matrix products"
    if COLLECTIVE.fullmatch(own.op):
        return "collectives"
    last = own.op_name.rpartition("/")[2]
    if own.op.startswith("copy") or last in ("convert_element_type", "transpose", "copy"):
        return "casts and copies"
    return next((name for name, pattern in PARTS if re.search(pattern, own.op_name)), "other")


def moved(running: Running, module: Module) -> int:
    """Return the bytes that a kernel reads and writes."""
    own, beside = running.instruction, module.computations[running.computation]
    written = sum(sizes(own.shape))
    read = [sum(sizes(beside[name].shape)) if name in beside else 0 for name in own.operands]
    if own.op != "fusion" or not own.called:
        return written + sum(read)
    inside = module.computations[own.called[0]]
    parameters = sorted(
        (i for i in inside.values() if i.op == "parameter"), key=lambda i: int(i.rest.partition(")")[0])
    )
    for number, parameter in enumerate(parameters):
        users = [i for i in inside.values() if parameter.name in i.operands]
        if users and all(
            i.op in ("dynamic-slice", "gather") and i.operands[0] == parameter.name for i in users
        ):
            read[number] = sum(sum(sizes(i.shape)) for i in users)
        elif users and all(
            i.op == "dynamic-update-slice" and i.operands[0] == parameter.name for i in users
        ):
            updates = sum(sum(sizes(inside[i.operands[1]].shape)) for i in users)
            written += updates - sum(sum(sizes(i.shape)) for i in users)  # in place
            read[number] = 0
    return written + sum(read)


def tally(text: str) -> dict[str, Any]:
    """Return kernels and bytes of one step by part, and its collectives, from the text of a program."""
    module = Module(text)
    counts: collections.Counter[str] = collections.Counter()
    volume: collections.Counter[str] = collections.Counter()
    exchanged = [0, 0]
    for running in kernels(module):
        name = part(running.instruction)
        counts[name] += running.times
        volume[name] += running.times * moved(running, module)
        if name == "collectives":
            exchanged[0] += running.times
            exchanged[1] += running.times * sum(sizes(running.instruction.shape))
    return {
        "kernels": sum(counts.values()),
        "bytes": sum(volume.values()),
        "collectives": exchanged[0],
        "collective_bytes": exchanged[1],
        "parts": {name: [count, volume[name]] for name, count in counts.most_common()},
    }
