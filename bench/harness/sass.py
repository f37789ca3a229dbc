"""Reads machine code (SASS) as nvdisasm prints it: blocks, loops, and what one iteration executes.

A loop is found by its back-branch: a block that jumps to one that dominates it. The code around all
loops counts as a loop that a block of threads runs once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

CLASSES = ("memory", "integer", "floating point", "control")
_MEMORY = re.compile(r"(LD|ST|ATOM|RED|ULDC|CCTL|UBLKCP|UTMA)")
_FLOATING = re.compile(
    r"([FDH](ADD|MUL|FMA|SET|SETP|SEL|MNMX|CHK|SWZ)|[HDFI]MMA|MUFU|F2|I2F|FRND|H(ADD|MUL|FMA)2)"
)
_CONTROL = re.compile(
    r"(BRA|BRX|JMP|JMX|EXIT|RET|CALL|BSSY|BSYNC|BREAK|BAR|WARPSYNC|YIELD|NOP|NANOSLEEP|DEPBAR|"
    r"LDGDEPBAR|MEMBAR|ERRBAR|CGAERRBAR|ENDCOLLECTIVE|WARPGROUP|KILL|BPT)"
)
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z0-9_]+)([.A-Z0-9_]*)\s*([^;]*);"
)
_PLACE = re.compile(r'(?:File|inlined at) "([^"]+)", line (\d+)')
_Path = tuple[tuple[int, int, int], list["Instruction"]]  # bytes loaded, stored; length
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: of the kernel's code, in bytes.
        guard: the predicate that it depends on; "" for none.
        opcode: such as "LDG".
        modifiers: such as ".E.128".
        operands: as printed.
        places: file and line in the source, innermost first, of every call that was inlined.
    """

    address: int
    guard: str
    opcode: str
    modifiers: str
    operands: str
    places: tuple[tuple[str, int], ...]

    @property
    def kind(self) -> str:
        """One of `CLASSES`; what moves or computes anything else than numbers is an integer."""
        if _CONTROL.fullmatch(self.opcode):
            return "control"
        if _MEMORY.match(self.opcode):
            return "memory"
        return "floating point" if _FLOATING.match(self.opcode) else "integer"

    @property
    def bytes(self) -> int:
        """What a memory instruction moves per thread."""
        return next((_BYTES[x] for x in self.modifiers.split(".") if x in _BYTES), 4)

    def moves(self, how: str) -> bool:
        """Whether it loads ("LD") or stores ("ST") in global or shared memory."""
        return self.opcode in (f"{how}G", f"{how}S", f"{how}GSTS")

    @property
    def base(self) -> tuple[str, str]:
        """Register and offset of the address; for copies to shared memory, that of the source."""
        found = re.findall(r"\[(U?R\w+(?:\.\w+)*)?(?:\+)?([^\[\]]*)\]", self.operands)
        return found[-1] if found else ("", "")


@dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)


@dataclass
class Loop:
    """A loop by its blocks.

    Attributes:
        header: the first block.
        blocks: all, those of inner loops included.
        inner: the loops directly inside.
        whole: True for the code that no loop contains.
    """

    header: int
    blocks: set[int]
    inner: list[Loop] = field(default_factory=list)
    whole: bool = False

    @property
    def own(self) -> set[int]:
        """Blocks that no inner loop contains."""
        return self.blocks - set().union(*(loop.blocks for loop in self.inner))


@dataclass(frozen=True)
class Iteration:
    """What a warp executes in one iteration of a loop.

    Attributes:
        instructions: of the longest path; those of inner loops once.
        fewest: instructions of the shortest path that loads and stores as many weights.
        weights: that a thread handles.
    """

    instructions: list[Instruction]
    fewest: int
    weights: float

    @property
    def by_class(self) -> Counter[str]:
        """How many instructions of each class the longest path has."""
        return Counter(x.kind for x in self.instructions)


class Code:
    """The machine code of one kernel.

    Args:
        text: its section, as `nvdisasm -c -gi` prints it.
        rare: calls in the source that the common case does not make; blocks that come from them are
            on no path.
        sources: lines of the source by the file's name.
    """

    def __init__(
        self, text: str, rare: Collection[str] = (), sources: dict[str, list[str]] | None = None
    ) -> None:
        self._rare, self._sources = tuple(rare), sources or {}
        self.blocks = _blocks(text)
        self._order = _reverse_postorder(self.blocks)

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, the code around them last."""
        predecessors = defaultdict(list)
        for block in self._order:
            for successor in self.blocks[block].successors:
                predecessors[successor].append(block)
        dominators = _immediate_dominators(self._order, predecessors)
        found: dict[int, Loop] = {}
        for block in self._order:
            for header in self.blocks[block].successors:
                if header in _dominators_of(block, dominators):
                    loop = found.setdefault(header, Loop(header, {header}))
                    _add_body(loop.blocks, block, predecessors)
        loops = sorted(found.values(), key=lambda loop: len(loop.blocks))
        loops.append(Loop(self._order[0], set(self._order), whole=True))
        for i, loop in enumerate(loops[:-1]):
            outer = next(x for x in loops[i + 1 :] if loop.header in x.blocks)
            outer.inner.append(loop)
        return loops

    def main_loop(self) -> Loop:
        """The loop whose own code loads the most bytes of global memory."""

        def loaded(loop: Loop) -> int:
            own = self._instructions(loop.own)
            return sum(x.bytes for x in self._regular(own, "LD") if "G" in x.opcode)

        return max(self.loops, key=loaded)

    def loop_of(self, call: str) -> Loop:
        """The loop that a call in the source became.

        Of the loops that have most of its code, or half as much, the one that has least beside it:
        what is computed before an inner loop belongs to the loop around it.

        Args:
            call: how the call begins, such as "shrink_tile<T>(rows"; it stands on one line. Of
                "load( @ sweep<2>(" the loop is that of load in the code of sweep<2>.

        Raises:
            LookupError: no loop has any.
        """
        calls, sizes = call.split(" @ "), {}
        for i, loop in enumerate(self.loops):
            own = list(self._instructions(loop.own))
            sizes[i] = sum(all(self._comes_from(x, [y]) for y in calls) for x in own), len(own)
        most = max(size for size, _ in sizes.values())
        if not most:
            raise LookupError(f"no loop of the kernel comes from the call {call}")
        large = [i for i, (size, _) in sizes.items() if 2 * size >= most]
        return self.loops[max(large, key=lambda i: sizes[i][0] / sizes[i][1])]

    def iteration(
        self, loop: Loop, element_bytes: int, arrays: int = 1, inner: bool = True
    ) -> Iteration:
        """The common path through a loop: all weights are loaded and stored, nothing rare happens.

        Args:
            loop: one of `loops`.
            element_bytes: of a weight.
            arrays: that are read, as gradients and moments are, where the addresses do not tell.
            inner: whether inner loops count, once each.
        """
        own = list(self._instructions(loop.own))
        loads, stores = ({id(x) for x in self._regular(own, how)} for how in ("LD", "ST"))
        shortest, longest = (self._path(loop, loads, stores, sign, inner) for sign in (-1, 1))
        moved = [x for x in shortest if id(x) in loads]
        return Iteration(longest, len(shortest), _weights(moved, element_bytes, arrays))

    def _instructions(self, blocks: Iterable[int]) -> Iterator[Instruction]:
        for block in sorted(blocks):
            if not self._is_rare(block):
                yield from self.blocks[block].instructions

    def _is_rare(self, block: int) -> bool:
        """Whether a block comes from a rare call mostly; its end too, which may be the test."""
        instructions = self.blocks[block].instructions
        rare = [self._comes_from(x, self._rare) for x in instructions]
        return rare[-1] and 2 * sum(rare) > len(rare)

    def _comes_from(self, instruction: Instruction, calls: Iterable[str]) -> bool:
        """Whether one of the calls stands in a line that the instruction comes from."""
        for file, line in instruction.places:
            text = self._sources.get(file, [])[line - 1 : line]
            if text and any(call in text[0] for call in calls):
                return True
        return False

    def _regular(self, instructions: Iterable[Instruction], how: str) -> list[Instruction]:
        """The loads or stores of weights: of the width that moves most bytes.

        Those of less than 16 bytes of global memory count where they stand at steps from one
        address, unless none does: else the scalars of a table would count as well.
        """
        moving = [x for x in instructions if x.moves(how)]
        steps: dict[tuple, set[str]] = defaultdict(set)
        for x in moving:
            steps[x.opcode, x.bytes, x.base[0]].add(x.base[1])

        def is_regular(x: Instruction) -> bool:
            wide = x.bytes == 16 and "G" in x.opcode
            return wide or len(steps[x.opcode, x.bytes, x.base[0]]) >= 4

        regular = list(filter(is_regular, moving))
        total: Counter[int] = Counter()
        for x in regular or moving:
            total[x.bytes] += x.bytes
        width = max(total, key=lambda w: (total[w], w), default=0)
        return [x for x in regular or moving if x.bytes == width]

    def _path(
        self, loop: Loop, loads: set[int], stores: set[int], sign: int, counted: bool = True
    ) -> list[Instruction]:
        """The path that loads and then stores most; of several the longest, or shortest (-1)."""
        inner = {x.header: x for x in loop.inner}
        # An inner loop is one step of the path, named by its first block.
        step_of = {block: block for block in loop.own}
        step_of.update({block: x.header for x in loop.inner for block in x.blocks})
        best: dict[int, _Path] = {loop.header: ((0, 0, 0), [])}  # up to a step
        ends: list[_Path] = []
        for step in dict.fromkeys(step_of[x] for x in self._order if x in step_of):
            if step not in best or self._is_rare(step):
                continue
            (loaded, stored, length), path = best[step]
            if step in inner:
                inside = self._path(inner[step], set(), set(), sign) if counted else []
                blocks = inner[step].blocks
            else:
                inside, blocks = self.blocks[step].instructions, {step}
                loaded += sum(x.bytes for x in inside if id(x) in loads)
                stored += sum(x.bytes for x in inside if id(x) in stores)
            score = (loaded, stored, length + sign * len(inside))
            longer = (score, [*path, *inside])
            if any(self._is_end(loop, block) for block in blocks):
                ends.append(longer)
            for successor in {x for block in blocks for x in self.blocks[block].successors}:
                after = step_of.get(successor)
                if after in (None, step, loop.header):
                    continue
                if after not in best or best[after][0] < score:
                    best[after] = longer
        return max(ends, key=lambda x: x[0])[1] if ends else []

    def _is_end(self, loop: Loop, block: int) -> bool:
        if loop.whole:
            return self.blocks[block].instructions[-1].opcode in ("EXIT", "RET")
        return loop.header in self.blocks[block].successors


def _weights(moving: list[Instruction], element_bytes: int, arrays: int) -> float:
    """Weights that a thread loads by these instructions."""
    if not moving:
        return 0.0
    offsets: dict[str, set[str]] = defaultdict(set)
    for x in moving:
        offsets[x.base[0]].add(x.base[1])
    most = max(map(len, offsets.values()))
    # One array has one base register, unless the compiler adds up an address for every load.
    count = most if 2 * most * arrays > len(moving) else len(moving) / arrays
    return count * moving[0].bytes / element_bytes


def sections(listing: str) -> dict[str, str]:
    """The code of every kernel in a listing, by its symbol."""
    parts = re.split(r"(?m)^\s*\.section\s+\.text\.([^,\s]+),.*$", listing)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _blocks(text: str) -> list[Block]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    places: list[tuple[str, int]] = []
    fresh = False
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif "//##" in line:
            if not fresh:
                places, fresh = [], True
            places += [(_file_name(f), int(n)) for f, n in _PLACE.findall(line)]
        elif match := _INSTRUCTION.search(line):
            address, guard, opcode, modifiers, operands = match.groups(default="")
            fresh = False
            instructions.append(
                Instruction(
                    *(int(address, 16), guard, opcode, modifiers, operands.strip()),
                    places=tuple(dict.fromkeys(places)),
                )
            )
    following = [_following(x, i, labels) for i, x in enumerate(instructions)]
    first = {0, *labels.values()}
    first |= {i + 1 for i, after in enumerate(following) if after != [i + 1]}
    begins = sorted(i for i in first if i < len(instructions))
    number = {begin: i for i, begin in enumerate(begins)}
    blocks = []
    for begin, end in zip(begins, [*begins[1:], len(instructions)], strict=True):
        after = [number[i] for i in following[end - 1] if i in number]
        blocks.append(Block(instructions[begin:end], after))
    return blocks


def _file_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _following(x: Instruction, i: int, labels: dict[str, int]) -> list[int]:
    """Where the program may go on."""
    targets = [labels[t] for t in re.findall(r"\.L_x_\d+", x.operands)]
    if (x.opcode == "BRA" and ".DIV" not in x.modifiers) or (x.opcode == "CALL" and targets):
        # A call within the kernel is a far jump. A second predicate may be an operand.
        sometimes = x.guard or re.match(r"!?U?P\d", x.operands)
        return [*targets, i + 1] if sometimes else targets
    if x.opcode in ("BRX", "JMX"):
        return targets
    if x.opcode in ("EXIT", "RET"):
        return [i + 1] if x.guard else []
    return [i + 1]


def _reverse_postorder(blocks: list[Block]) -> list[int]:
    order, seen, stack = [], {0}, [(0, iter(blocks[0].successors))]
    while stack:
        block, rest = stack[-1]
        after = next((s for s in rest if s not in seen), None)
        if after is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(blocks[after].successors)))
    return order[::-1]


def _immediate_dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm"."""
    rank = {block: i for i, block in enumerate(order)}
    found = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in found]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if rank[new] > rank[other]:
                        new = found[new]
                    else:
                        other = found[other]
            if found.get(block) != new:
                found[block], changed = new, True
    return found


def _dominators_of(block: int, immediate: dict[int, int]) -> set[int]:
    found = {block}
    while immediate[block] != block:
        block = immediate[block]
        found.add(block)
    return found


def _add_body(body: set[int], latch: int, predecessors: dict[int, list[int]]) -> None:
    stack = [latch]
    while stack:
        block = stack.pop()
        if block not in body:
            body.add(block)
            stack += predecessors[block]
