"""Reads compiled HLO text: what a program moves, multiplies and sends, with loops counted as often as they run."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

__all__ = ["Collective", "Hlo"]

_WIDTH = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "c64": 8, "c128": 16}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# They name memory and move none.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
         "after-all", "optimization-barrier", "iota", "partition-id", "replica-id"}  # fmt: skip
_ARITHMETIC = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "compare", "and", "or",
               "remainder", "exponential", "log", "tanh", "logistic", "rsqrt", "sqrt", "power", "sine", "cosine", "erf",
               "round-nearest-even", "floor", "clamp"}  # fmt: skip
_SAME_VALUES = {"convert", "copy", "bitcast", "reshape", "transpose", "copy-start", "copy-done", "fusion-done",
                "dynamic-slice", "slice", "optimization-barrier"}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a core's own memory, which XLA writes as a memory space other than 0

    @property
    def bytes(self) -> float:
        width = _WIDTH.get(self.dtype)
        if width is None:
            width = int(re.search(r"\d+", self.dtype)[0]) / 8
        return width * math.prod(self.dims)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    return tuple(
        Shape(
            dtype,
            tuple(int(d) for d in dims.replace("<=", "").split(",") if d),
            bool(re.search(r"S\([1-9]\d*\)", layout)),
        )
        for dtype, dims, layout in found
    )


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str  # between the parentheses: the value of a constant, the number of a parameter
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def calls(self) -> list[str]:
        """The computations that it runs."""
        names = re.findall(r"\b(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)", self.attributes)
        for group in re.findall(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}", self.attributes):
            names += re.findall(r"%?([\w.\-]+)", group)
        return names

    @property
    def op_name(self) -> str:
        return (self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "").replace("\\'", "'").replace('\\"', '"')


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        found[2],
        rest[:opening],
        _shapes(shape),
        tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments,
        rest[closing + 1 :],
        bool(found[1]),
    )


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for i in self.instructions.values():
            for name in i.operands:
                users.setdefault(name, []).append(i)
        return users


@dataclass(frozen=True)
class Collective:
    """One exchange between devices; bytes are of each device."""

    kind: str
    group: int
    """Devices that exchange with one another."""
    times: float
    """How often a run of the program executes it."""
    bytes: float
    """What is gathered, reduced or sent, a time."""
    sent: float
    """What a device sends, a time, if the devices form a ring."""
    source: str | None
    """The argument of the program that is exchanged, if it is one."""
    shapes: tuple[tuple[int, ...], ...]


class Hlo:
    """A compiled module, as `compiled.as_text()` gives it for a program of so many devices. All counts are of one."""

    def __init__(self, text: str, devices: int = 1):
        self.devices = devices
        self.computations: dict[str, Computation] = {}
        current = None
        for line in text.splitlines():
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations[found[2]] = Computation(found[2])
                if found[1]:
                    self.entry = current
            elif current is not None and (instruction := _instruction(line)):
                current.instructions[instruction.name] = instruction
        # Which instruction runs a computation (of several the first, e.g. for sums that share their addition).
        self._callers: dict[str, tuple[Computation, Instruction]] = {}
        for computation in self.computations.values():
            for i in computation.instructions.values():
                for name in i.calls:
                    self._callers.setdefault(name, (computation, i))

    @property
    def arguments(self) -> list[tuple[str, Shape]]:
        """The name that JAX gave to each argument, such as state.params['w'], and this device's part of it."""
        rows = sorted(self.entry.parameters.items())
        return [(i.op_name, shape) for _, i in rows for shape in i.shapes]

    @cached_property
    def _times(self) -> tuple[dict[str, float], bool]:
        """How often each computation runs, and whether every loop's trip count is known."""
        times: dict[str, float] = {}
        exact = True

        def walk(computation: Computation, n: float) -> None:
            nonlocal exact
            times[computation.name] = times.get(computation.name, 0.0) + n
            for i in computation.instructions.values():
                trips = self._trips(computation, i) if i.opcode == "while" else 1
                if trips is None:
                    exact, trips = False, 1
                for name in i.calls:
                    walk(self.computations[name], n * trips)

        walk(self.entry, 1.0)
        return times, exact

    @property
    def exact(self) -> bool:
        """Whether all trip counts are known; if not, counts are lower bounds."""
        return self._times[1]

    def _trips(self, computation: Computation, loop: Instruction) -> int | None:
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        # TPU programs come without that note. The loops of JAX count up by one while a counter is less than a bound.
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        test = condition.root
        operands = [(condition, name) for name in test.operands]
        if test.opcode == "fusion":
            test = self.computations[test.calls[0]].root
        if test.opcode != "compare" or "direction=LT" not in test.attributes or len(operands) != 2:
            return None
        start, bound = (self._constant(*operand) for operand in operands)
        return None if start is None or bound is None else max(bound - start, 0)

    def _constant(self, computation: Computation, name: str) -> int | None:
        place = self.source(computation, name)
        found = place and re.fullmatch(r"-?\d+", place[1].arguments)
        return int(found[0]) if found and place[1].opcode == "constant" else None

    def source(self, computation: Computation, name: str) -> tuple[Computation, Instruction] | None:
        """Where a value comes from: an argument of the program, a constant or the operation that computes it, seen
        through copies, conversions, slices, fusions and loops that pass it on."""
        i = computation.instructions.get(name)
        if i is None:
            return None
        if i.opcode in _SAME_VALUES:
            return self.source(computation, i.operands[0])
        if i.opcode == "parameter":
            if computation is self.entry:
                return computation, i
            caller, call = self._callers[computation.name]
            if call.opcode in ("fusion", "fusion-start", "call") and int(i.arguments) < len(call.operands):
                return self.source(caller, call.operands[int(i.arguments)])
            return None
        if i.opcode in ("fusion", "fusion-start"):
            inner = self.computations[i.calls[0]]
            return self.source(inner, inner.root.name)
        if i.opcode == "get-tuple-element":
            index = int(i.attribute(r"index=(\d+)"))
            scope, made = computation, computation.instructions[i.operands[0]]
            if made.opcode == "parameter" and computation is not self.entry:
                # The state of a loop: its value before the first iteration.
                scope, made = self._callers[computation.name]
                if made.opcode == "while":
                    made = scope.instructions[made.operands[0]]
            if made.opcode == "fusion":
                scope = self.computations[made.calls[0]]
                made = scope.root
            if made.opcode == "optimization-barrier":
                made = scope.instructions[made.operands[0]]
            return self.source(scope, made.operands[index]) if made.opcode == "tuple" else (computation, i)
        return computation, i

    def _executed(self) -> Iterator[tuple[Computation, Instruction, float]]:
        times, _ = self._times
        for name, n in times.items():
            for i in self.computations[name].instructions.values():
                yield self.computations[name], i, n

    def matmul_flops(self) -> float:
        """2 x multiplications of matrix products and convolutions."""
        return sum(n * _product(c, i) for c, i, n in self._executed())

    def flops(self) -> float:
        """Products and elementwise arithmetic.

        XLA's own cost analysis counts the body of a loop once, and nothing at all where a GPU's libraries do products.
        """
        return sum(n * (_product(c, i) + _elementwise(c, i)) for c, i, n in self._executed())

    def bytes(self) -> float:
        """Read from and written to the device's main memory: arguments and results of every fused operation."""
        inner = {name for c in self.computations.values() for i in c.instructions.values() for name in i.calls
                 if i.opcode not in ("while", "conditional", "call")}  # fmt: skip
        return sum(n * self._traffic(c, i) for c, i, n in self._executed() if c.name not in inner)

    def _traffic(self, computation: Computation, i: Instruction) -> float:
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return 0.0
        operands = [_outside(computation.instructions[name].shapes) for name in i.operands]
        written = _outside(i.shapes)
        if i.opcode == "fusion-start":
            i = dataclasses.replace(i, opcode="fusion", shapes=self.computations[i.calls[0]].root.shapes)
            written = _outside(i.shapes)
        if i.opcode.endswith("-start"):  # its tuple repeats the operands
            written = _outside(i.shapes[:1] if i.opcode == "copy-start" else i.shapes[-1:])
        if i.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * written if operands[0] else written
        if i.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if i.opcode == "fusion":
            inner = self.computations[i.calls[0]]
            read = 0.0
            for number, bytes in enumerate(operands):
                users = inner.users.get(inner.parameters[number].name, []) if number in inner.parameters else []
                # Of a stack that is sliced, or written in place, only the slice moves.
                kinds = {u.opcode for u in users if u.operands[0] == inner.parameters[number].name}
                if bytes and users and len(kinds) == 1 and kinds <= {"dynamic-slice", "gather"}:
                    bytes = min(bytes, sum(s.bytes for u in users for s in u.shapes))
                elif bytes and kinds == {"dynamic-update-slice"}:
                    bytes = 0.0
                read += bytes
            results = [inner.root.name] if inner.root.opcode != "tuple" else list(inner.root.operands)
            for k, name in enumerate(results):
                result = inner.instructions[name]
                while result.opcode in ("bitcast", "copy", "convert") and result.operands[0] in inner.instructions:
                    result = inner.instructions[result.operands[0]]
                if result.opcode == "dynamic-update-slice" and k < len(i.shapes) and not i.shapes[k].on_chip:
                    update = sum(s.bytes for s in inner.instructions[result.operands[1]].shapes)
                    written += update - i.shapes[k].bytes
            return read + written
        return sum(operands) + written

    def collectives(self) -> list[Collective]:
        """Every exchange between devices that the program executes."""
        found: dict[object, Collective] = {}
        for computation, i, n in self._executed():
            kind = i.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            # On a TPU one exchange may be written in several fusions that start it, go on with it and finish it.
            caller = self._callers.get(computation.name)
            pieces = caller is not None and caller[1].opcode == "fusion"
            channel = i.attribute(r"channel_id=(\d+)")
            key = (kind, channel, caller[0].name) if pieces and channel else (computation.name, i.name)
            group = _group_size(i, self.devices)
            if key in found or group == 1:
                continue
            if pieces and kind == "all-reduce" and "all-reduce-scatter" in computation.name:
                kind = "reduce-scatter"
            shapes = [s for name in i.operands for s in computation.instructions[name].shapes]
            held = sum(s.bytes for s in shapes)
            bytes, sent = {
                "all-gather": (held * group, held * (group - 1)),
                "all-reduce": (held, 2 * held * (group - 1) / group),
                "collective-permute": (held, held),
            }.get(kind, (held, held * (group - 1) / group))
            place = self.source(computation, i.operands[0])
            source = place[1].op_name if place and place[0] is self.entry and place[1].opcode == "parameter" else None
            results = i.shapes[-len(shapes) :] if i.opcode.endswith("-start") else i.shapes
            found[key] = Collective(kind, group, n, bytes, sent, source, tuple(s.dims for s in results))
        return list(found.values())


def _outside(shapes: tuple[Shape, ...]) -> float:
    return sum(s.bytes for s in shapes if not s.on_chip)


def _group_size(i: Instruction, devices: int) -> int:
    if i.opcode.startswith("collective-permute"):
        return len(
            re.findall(r"\{\d+,\d+\}", i.attributes.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
        )
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", i.attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", i.attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return devices


def _product(computation: Computation, i: Instruction) -> float:
    target = i.attribute(r'custom_call_target="([^"]*)"') or ""
    if i.opcode not in ("dot", "convolution") and not target.startswith(("__cublas$", "__cudnn$conv")):
        return 0.0
    first, second = (computation.instructions[name].shapes[0].dims for name in i.operands[:2])
    result = i.shapes[0].dims
    if i.opcode == "dot" or target.startswith("__cublas$"):
        contracted = i.attribute(r"lhs_contracting_dim(?:s=|ensions\":)[{\[]([^}\]]*)") or ""
        terms = math.prod(first[int(d)] for d in re.findall(r"\d+", contracted))
        return 2.0 * math.prod(result) * terms if terms > 1 else 0.0
    # cuDNN's backward passes carry the labels of the forward one.
    if "BackwardInput" in target:
        return _convolution(i, result, second, first)
    if "BackwardFilter" in target:
        return _convolution(i, first, result, second)
    return _convolution(i, first, second, result)


def _elementwise(computation: Computation, i: Instruction) -> float:
    if i.opcode == "reduce":
        return float(math.prod(computation.instructions[i.operands[0]].shapes[0].dims))
    return float(math.prod(i.shapes[0].dims)) if i.opcode in _ARITHMETIC else 0.0


def _convolution(i: Instruction, left: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Only positions inside the unpadded, undilated input count: TPU programs write batched products with the rest."""
    inputs, kernels, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    window = {k: v.split("x") for k, v in re.findall(r"(\w+)=([\dx_\-]+)", i.attribute(r"window=\{([^}]*)\}") or "")}
    total = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * kernel[kernels.index("i")]
    for axis in sorted(c for c in outputs if c.isdigit()):
        k = int(axis)
        option = lambda name, default, k=k: int(window[name][k]) if name in window else default  # noqa: E731
        low = int(window["pad"][k].split("_")[0]) if "pad" in window else 0
        dilation = option("lhs_dilate", 1)
        taps = np.arange(kernel[kernels.index(axis)]) * option("rhs_dilate", 1)
        at = np.arange(out[outputs.index(axis)])[:, None] * option("stride", 1) + taps - low
        total *= np.sum((at >= 0) & (at <= (left[inputs.index(axis)] - 1) * dilation) & (at % dilation == 0))
    return float(total) / int(i.attribute(r"batch_group_count=(\d+)") or 1)
