"""Read a program: the text of an HLO module, as `compiled.as_text()` or `lowered.as_text("hlo")` returns it.

Loops count as often as they run: their `known_trip_count`, or the constant in their condition. A loop that has neither,
such as the loop over training steps, counts once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
CALLS = (
    "call",
    "conditional",
    "async-start",
)  # whose computations consist of instructions that run by themselves


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: unique in its computation.
        shape: type of what it returns, as text.
        op: such as "fusion" or "all-reduce".
        rest: everything after the opening bracket: operands, attributes, metadata.
    """

    name: str
    shape: str
    op: str
    rest: str

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, such as "jit(f)/while/body/conv1/conv_general_dilated"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        given = re.sub(r"/\*.*?\*/", "", self.rest.partition(")")[0])
        return re.findall(r"%([\w.-]+)", given) or [name for name in given.split(", ") if name]

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs, loops apart; all branches of a conditional."""
        branches = BRANCHES.search(self.rest)
        return re.findall(r"[\w.-]+", branches[1]) if branches else CALLED.findall(self.rest)

    def attribute(self, name: str) -> str:
        """Return an attribute such as `kind` or `custom_call_target`; "" if there is none."""
        found = re.search(rf'\b{name}="?([\w$.:-]+)', self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Running:
    """An instruction, and how often it runs.

    Attributes:
        instruction: the instruction.
        computation: name of the computation it is in.
        times: product of the lengths of the loops around it.
        uncounted: how many of these loops are of unknown length, and counted once.
    """

    instruction: Instruction
    computation: str
    times: int
    uncounted: int


class Module:
    """The computations of a program.

    Attributes:
        computations: the instructions of each, by name, in order.
        entry: name of the one that is called first.

    Args:
        text: of the module.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        own: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                own = self.computations[found[2]] = {}
                self.entry = found[2] if found[1] else self.entry
            elif found := INSTRUCTION.match(line):
                own[found[1]] = Instruction(*found.groups())

    def running(self, name: str = "", times: int = 1, uncounted: int = 0) -> Iterator[Running]:
        """Yield what runs by itself: instructions of the entry, of loops and of calls, not those inside fusions."""
        name = name or self.entry
        for own in self.computations[name].values():
            yield Running(own, name, times, uncounted)
            if own.op == "while":
                turns = self._turns(own)
                loop = LOOP.search(own.rest)
                assert loop, own
                yield from self.running(loop[2], times * (turns or 1), uncounted + (turns is None))
            elif own.op in CALLS:
                for called in own.called:
                    yield from self.running(called, times, uncounted)

    def _turns(self, loop: Instruction) -> int | None:
        """Return how often a loop runs: what XLA knows, or the only constant in its condition; None: unknown."""
        if trips := TRIPS.search(loop.rest):
            return int(trips[1])
        found = LOOP.search(loop.rest)
        assert found, loop
        condition = self.computations[found[1]].values()
        constants = [
            own.rest.partition(")")[0]
            for own in condition
            if own.op == "constant" and own.shape in ("s32[]", "s64[]")
        ]
        return int(constants[0]) if len(constants) == 1 else None


def flops(text: str) -> int:
    """Return the FLOPs of the convolutions and matrix products of a program, before XLA optimizes it.

    A multiply-accumulate is two. Zeros of dilated images do not count, those of padding do.
    """
    module, total = Module(text), 0
    for running in module.running():
        own = running.instruction
        if own.op not in ("convolution", "dot"):
            continue
        beside = module.computations[running.computation]
        left, right = (dimensions(beside[name].shape) for name in own.operands[:2])
        if own.op == "dot":
            found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", own.rest)
            summed = math.prod(left[int(i)] for i in found[1].split(",") if i) if found else 1
        else:
            labels = re.search(r"dim_labels=\w+_(\w+)->", own.rest)
            assert labels, own
            summed = math.prod(right) // right[labels[1].index("o")]
            dilation = re.search(r"lhs_dilate=([\dx]+)", own.rest)
            summed /= math.prod(map(int, dilation[1].split("x"))) if dilation else 1
        total += running.times * round(2 * math.prod(dimensions(own.shape)) * summed)
    return total


def dimensions(shape: str) -> list[int]:
    """Return the dimensions of an array's type."""
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def sizes(shape: str) -> list[int]:
    """Return the bytes of each array in a type such as "(f32[1,16]{1,0}, bf16[8]{0})"."""

    def bits(dtype: str) -> int:
        digits = re.search(r"\d+", dtype)
        return int(digits[0]) if digits else 8 * (dtype == "pred")

    found = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shape)
    return [math.prod(map(int, filter(None, dims.split(",")))) * bits(dtype) // 8 for dtype, dims in found]
