"""The time of a program for TPUs by its compiler's own estimates, which need no TPU.

XLA's compiler writes into a compiled program how many cycles it expects of every fused operation, copy and reduction.
Their sum over the program, each loop counted as often as it turns, contains what a count of operations misses: products
that do not fill the matrix units, copies from one memory layout into another, passes over the residual stream.

Pallas kernels and collectives have no estimate. Kernels are listed by name and number of runs. Collectives are listed
by the bytes that a chip sends, and by the cycles of other work between their start and their end, which hide them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

# What an instruction mostly does: multiply matrices; change nothing but the place of values in memory; sum over an
# axis; or compute each value by itself.
KINDS = ("products", "layouts", "reductions", "elementwise")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ((?:\([^=]*?\)|\S+)) ([a-z][\w\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = str(2**63 - 1)  # what the compiler writes where it cannot tell
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_COLLECTIVE = re.compile(r"^(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start|-done)?$")
_MOVES = {
    "copy", "transpose", "reshape", "bitcast", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad",
    "broadcast", "copy-start", "copy-done", "parameter", "constant", "tuple", "get-tuple-element", "gather", "iota",
}  # fmt: skip
_OURS = "world_distill/"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
      cycles: of all its runs.
      runs: how often it runs.
      kind: one of `KINDS`.
      what: the compiler's name for its operation, and the shape of its result.
      source: file and line of this package that it was traced from; empty where the compiler does not say.
    """

    cycles: float
    runs: int
    kind: str
    what: str
    source: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
      runs: how often it runs.
      sent: bytes that a chip sends each time, around a ring.
      hidden: cycles of other instructions that are scheduled between its start and its end; 0: the chip waits for it.
    """

    kind: str
    runs: int
    sent: float
    hidden: float


@dataclasses.dataclass
class Estimate:
    """What the compiler expects of one call of a program on one chip.

    Attributes:
      instructions: with an estimate of their cycles.
      kernels: Pallas kernels by name: runs.
      collectives: as they stand in the program.
      endless: loops of which the number of turns is not known; each counts as one turn.
      unknown: instructions of which the compiler says that it does not know the cycles; they count as none.
      unread: collectives whose groups of chips could not be read; they count as if they sent nothing.
    """

    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    endless: int = 0
    unknown: int = 0
    unread: int = 0

    @property
    def cycles(self) -> dict[str, float]:
        """By kind."""
        found: dict[str, float] = {kind: 0.0 for kind in KINDS}
        for instruction in self.instructions:
            found[instruction.kind] += instruction.cycles
        return found

    @property
    def total(self) -> float:
        """Cycles of everything that has an estimate."""
        return sum(instruction.cycles for instruction in self.instructions)

    @property
    def counts(self) -> dict[str, int]:
        """Collectives by kind, as they stand in the program: one in a loop's body counts once."""
        return dict(sorted(collections.Counter(one.kind for one in self.collectives).items()))

    def largest(self, count: int = 10) -> list[Instruction]:
        """The most expensive instructions, in falling order. Equal ones from one line of code are merged."""
        merged: dict[tuple[str, str, str], Instruction] = {}
        for one in self.instructions:
            key = one.kind, one.what, one.source
            before = merged.get(key)
            cycles, runs = (before.cycles, before.runs) if before else (0.0, 0)
            merged[key] = dataclasses.replace(one, cycles=cycles + one.cycles, runs=runs + one.runs)
        return sorted(merged.values(), key=lambda one: -one.cycles)[:count]

    def waiting(self, hertz: float, bandwidth: float) -> float:
        """Seconds in which a chip waits for collectives.

        Args:
          hertz: the chip's clock.
          bandwidth: bytes that the chip sends in a second.
        """
        return sum(max(c.sent / bandwidth - c.hidden / hertz, 0.0) * c.runs for c in self.collectives)


def estimate(hlo: str) -> Estimate:
    """Reads the text of a compiled program, `jax.stages.Compiled.as_text()`; on CPUs and GPUs it has no cycles."""
    program = _Program(hlo)
    found = Estimate()
    if program.entry:
        program.visit(program.entry, 1, found)
    return found


class _Program:
    """The computations of a compiled program, and where its instructions come from."""

    def __init__(self, hlo: str):
        self.computations: dict[str, list[str]] = {}
        self.entry = ""
        current: list[str] | None = None
        # The source of a kernel stands in braces that look like the end of a computation.
        hlo = re.sub(r"kernel_metadata=\{\n.*?\n\}|/\*index=\d+\*/", "", hlo, flags=re.DOTALL)
        for line in hlo.splitlines():
            if current is None:
                if match := _COMPUTATION.match(line):
                    current = self.computations.setdefault(match[1], [])
                    if line.startswith("ENTRY"):
                        self.entry = match[1]
            elif line.startswith("}"):
                current = None
            else:
                current.append(line)
        self._sources = _sources(hlo)

    def visit(self, name: str, runs: int, found: Estimate) -> float:
        """Adds a computation that runs so often; returns the cycles of one run."""
        spent = 0.0
        begun: dict[str, tuple[int, float]] = {}  # collectives, by instruction and by channel: place, cycles before it
        for line in self.computations.get(name, []):
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            result, shape, operation = match.groups()
            if operation == "while":
                body, condition = (re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("body", "condition"))
                turns = self._turns(condition[1]) if condition else None
                found.endless += turns is None
                spent += (turns or 1) * self.visit(body[1] if body else "", runs * (turns or 1), found)
            elif operation in ("call", "conditional", "async-start"):
                names = [a or b for a, b in _BRANCHES.findall(line)] + _CALLS.findall(line)
                for inner in (n.strip().lstrip("%") for each in names for n in each.split(",")):
                    spent += self.visit(inner, runs, found)
            elif operation == "custom-call" and "tpu_custom_call" in line:
                kernel = re.sub(r"\.\d+$", "", result)
                found.kernels[kernel] = found.kernels.get(kernel, 0) + runs
            else:
                before = spent
                cycles = _CYCLES.search(line)
                if cycles and cycles[1] == _UNKNOWN:
                    found.unknown += 1
                elif cycles:
                    spent += float(cycles[1])
                    what = f"{operation} {re.sub(r'{[^}]*}', '', shape)}"
                    total, kind = float(cycles[1]) * runs, self._kind(operation, line)
                    found.instructions.append(Instruction(total, runs, kind, what, self._source(line)))
                if not (collective := self._collective(operation, shape, line)):
                    continue
                kind, sent, channel = collective
                # What ends one names what began it. Fusions of one channel are the start, parts and end of one, beside
                # products that hide it.
                given = re.match(r"\(%([\w.\-]+)", line[match.end() - 1 :])
                place = begun.get(given[1] if given else "") if operation.endswith("-done") else begun.get(channel)
                if place:
                    index, since = place
                    one = found.collectives[index]
                    found.collectives[index] = dataclasses.replace(one, hidden=spent - since)
                elif not operation.endswith("-done"):
                    place = len(found.collectives), before
                    found.unread += sent is None
                    found.collectives.append(Collective(kind, runs, sent or 0.0, spent - before))
                    begun |= {name: place for name in (result, channel) if name}
        return spent

    def _collective(self, operation: str, shape: str, line: str) -> tuple[str, float | None, str] | None:
        """(kind, bytes sent, "channel N" if it may be a part, else ""), if the instruction is one or is made of one.

        The bytes are None if its groups of chips cannot be read.
        """
        match = _COLLECTIVE.match(operation)
        if match:
            kind = match[1]
        elif operation == "fusion" and (called := _CALLS.search(line)):
            inner = [i for i in map(_INSTRUCTION.match, self.computations.get(called[1], [])) if i]
            inside = [i for i in inner if _COLLECTIVE.match(i[3])]
            if not inside:
                return None
            kind, shape, line = inside[0][3], inside[0][2], inside[0].string
        else:
            return None
        if shape.startswith("(") and operation.endswith("-start"):  # (what is given, what comes back, ...)
            shape = max(_parts(shape), key=_size)
        channel = _CHANNEL.search(line)
        channel = f"channel {channel[1]}" if channel and operation == "fusion" else ""
        ways, size = _ways(line), _size(shape)
        if kind == "collective-permute":
            return kind, size, channel
        if ways is None:
            return kind, None, channel
        if kind == "all-reduce" and operation == "fusion" and "all-reduce-scatter" in called[1]:
            kind, size = "reduce-scatter", size / ways  # of all sums that are made, each chip keeps its part
        factor = {"all-reduce": 2.0, "reduce-scatter": float(ways)}.get(kind, 1.0)
        return kind, factor * size * (ways - 1) / ways, channel

    def _turns(self, condition: str) -> int | None:
        """Of a loop that counts from 0 by 1 to the constant in its condition, as those of `scan` do."""
        text = "\n".join(self.computations.get(condition, []))
        for called in _CALLS.findall(text):
            text += "\n".join(self.computations.get(called, []))
        limits = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
        return max(limits, default=None)

    def _kind(self, operation: str, line: str) -> str:
        if operation in ("convolution", "dot"):
            return "products"
        if operation in _MOVES:
            return "layouts"
        if operation == "reduce":
            return "reductions"
        if operation != "fusion":
            return "elementwise"
        called = _CALLS.search(line)
        inner = {m[3] for m in map(_INSTRUCTION.match, self.computations.get(called[1] if called else "", [])) if m}
        if inner & {"convolution", "dot"}:
            return "products"
        if inner & {"reduce", "reduce-window"}:
            return "reductions"
        return "layouts" if inner <= _MOVES else "elementwise"

    def _source(self, line: str) -> str:
        frame = _FRAME.search(line)
        return self._sources.get(int(frame[1]), "") if frame else ""


def _sources(hlo: str) -> dict[int, str]:
    """Stack frame -> the innermost file and line of this package on the way out from it."""
    tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
    names, table = ("FileNames", "FunctionNames", "FileLocations", "StackFrames"), ""
    for line in hlo.splitlines():
        if line in names:
            table = line
        elif table and (row := re.match(r"(\d+) (.*)", line)):
            tables[table][int(row[1])] = row[2]
        elif table == names[-1] and not line.strip():
            break
    numbers = lambda text: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", text)}  # noqa: E731
    frames = {index: numbers(row) for index, row in tables["StackFrames"].items()}
    found = {}
    for index in frames:
        at, seen = index, set()
        while at in frames and at not in seen:
            seen.add(at)
            place = numbers(tables["FileLocations"].get(frames[at].get("file_location_id", 0), ""))
            file = tables["FileNames"].get(place.get("file_name_id", 0), "").strip('"')
            if _OURS in file:
                found[index] = f"{_OURS}{file.rpartition(_OURS)[2]}:{place.get('line', 0)}"
                break
            at = frames[at].get("parent_frame_id", 0)
    return found


def _ways(line: str) -> int | None:
    """How many chips take part in one collective; None if its groups cannot be read."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return max(match[1].count(",") + 1, 1)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    # Where they are not in the mesh's own order, the chips stand between the two.
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return max(math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2])), 1)
    return None


def _parts(shape: str) -> Iterator[str]:
    return (match[0] for match in _SHAPE.finditer(shape))


def _size(shape: str) -> float:
    """Bytes of all arrays in a shape's text."""
    total = 0.0
    for kind, sizes in _SHAPE.findall(shape):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])  # type: ignore[index]
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits / 8
    return total
