"""Reads GPU assembly: a kernel's instructions, its loops, and what the hottest loop is made of.

Both texts are read alike: SASS as `nvdisasm -c` prints it, and LLVM's assembly for AMD. A loop is a
natural loop (Aho, Lam, Sethi, Ullman, "Compilers", 9.6.6): a branch to a block that dominates it,
and all that reaches the branch without passing that block. Address ranges would not do: assemblers
move waits behind the end of the kernel, which jump back from there.

The hottest loop is, of those with a tensor-core instruction (else with a load from global memory,
else of all), the one with most instructions of those that hold no other such loop. Loops inside it,
as a wait for a barrier, count once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

KINDS = (
    "tensor",
    "integer",
    "float",
    "convert",
    "move",
    "global_load",
    "shared_load",
    "store",
    "local",
    "other",
)
"""`shared_load` holds tensor memory too, `local` a spill's stores and loads, `other` branches,
barriers, waits and what never executes."""

# The first pattern that matches names an opcode's kind: SASS up to a dot, AMD the whole opcode.
SASS_KINDS = (
    (r"(UTC)?[A-Z]G?MMA", "tensor"),
    (r"LDL|STL", "local"),
    (r"LD|LDG|LDGSTS|UBLKCP|UTMALDG", "global_load"),
    (r"LDS|LDSM|LDTM", "shared_load"),
    (r"STG?|STS|STSM|STTM|REDG?|ATOM[SG]?|UTMASTG|UTMAREDG", "store"),
    (r"I2F|I2FP|I2I|I2IP|F2I|F2IP|F2F|F2FP|FRND", "convert"),
    (r"U?(MOV|SEL|LDC|LDCU)|IMAD\.MOV|FSEL|CS2U?R|S2U?R|R2UR|R2P|P2R|MOVM|SHFL", "move"),
    (r"U?(IADD\w*|IMAD|ISETP|LOP3|PLOP3|SHF|SHL|SHR|LEA|PRMT|SGXT|BMSK|POPC|FLO|BREV)", "integer"),
    (r"U?(IABS|V?IMNMX3?|VIADD\w*|IDP|VABSDIFF4?|ISCADD)", "integer"),
    (r"U?[FHD](ADD|MUL|FMA|MNMX|SETP?|CHK)[23]?|FSWZADD|VHMNMX|MUFU", "float"),
)
AMD_KINDS = (
    (r"v_(mfma|smfmac)_.*", "tensor"),
    (r"scratch_.*", "local"),
    (r"(global|buffer|flat)_load_.*", "global_load"),
    (r"ds_(read|load).*", "shared_load"),
    (r"(global|buffer|flat)_(store|atomic).*|ds_(write|store|add).*", "store"),
    (r"v_cvt_.*", "convert"),
    (r"[vs]_(mov|cmov|cndmask|cselect|swap).*|v_(accvgpr|read|write).*|ds_.*permute.*", "move"),
    (r"s_(load|buffer_load)_.*", "move"),
    (
        r"s_(branch|cbranch|waitcnt|barrier|nop|setprio|endpgm|sched|sleep|trap|inst|icache).*",
        "other",
    ),
    (r"v_(pk_)?\w*_(f16|bf16|f32|f64)(_.*)?", "float"),
    (r"[vs]_.*", "integer"),
)


@dataclass(frozen=True)
class Instruction:
    """One line: opcode with modifiers, kind, labels it may jump to, whether it may fall through."""

    opcode: str
    kind: str
    targets: tuple[str, ...] = ()
    falls: bool = True


@dataclass(frozen=True)
class Code:
    """The instructions of a file in order, and the index of the one behind each label."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Loop:
    """What one pass through a loop issues per thread (scalar instructions: per warp).

    `kinds` has every word of `KINDS` and adds up to `instructions`; `opcodes` is most frequent
    first. A loop that the compiler unrolled holds several iterations of its source: `tensor` in
    `kinds` tells how many.
    """

    instructions: int
    kinds: dict[str, int]
    opcodes: dict[str, int]


def read_sass(text: str) -> Code:
    """The Code of `nvdisasm -c`'s output."""
    line = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for row in text.splitlines():
        if label := re.fullmatch(r"([.$\w]+):", row):
            labels[label[1]] = len(code)
        elif found := line.match(row):
            guard, opcode, rest = (found[1] or "").strip(), found[2], found[3].strip()
            jumps = opcode.startswith(("BRA", "BRX", "JMP", "JMX"))
            targets = tuple(re.findall(r"\.L_\w+", rest)) if jumps else ()
            always = not guard and (not jumps or rest.startswith("`"))
            ends = jumps or opcode.startswith(("EXIT", "RET"))
            kind = "other" if guard == "@!PT" else _sass_kind(opcode)
            code.append(Instruction(opcode, kind, targets, not (always and ends)))
    return Code(tuple(code), labels)


def read_amdgcn(text: str) -> Code:
    """The Code of LLVM's assembly for AMD GPUs."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for row in text.partition(".amdgpu_metadata")[0].splitlines():
        row = row.partition(";")[0].rstrip()
        if label := re.fullmatch(r"([.$\w]+):", row):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*)", row):
            opcode, rest = found.groups()
            targets = (rest,) if opcode.startswith(("s_branch", "s_cbranch")) else ()
            falls = not opcode.startswith(("s_branch", "s_endpgm", "s_setpc"))
            code.append(Instruction(opcode, _amd_kind(opcode), targets, falls))
    return Code(tuple(code), labels)


def _sass_kind(opcode: str) -> str:
    found = (kind for pattern, kind in SASS_KINDS if re.match(rf"({pattern})(\.|$)", opcode))
    return next(found, "other")


def _amd_kind(opcode: str) -> str:
    return next((kind for pattern, kind in AMD_KINDS if re.fullmatch(pattern, opcode)), "other")


def hottest(code: Code, entry: str) -> Loop | None:
    """The hottest loop of the kernel that starts at label `entry`; None if it has no loop."""
    found = loops(code, entry)
    for kind in ("tensor", "global_load"):
        with_kind = [body for body in found if _has(code, body, kind)]
        if with_kind:
            found = with_kind
            break
    innermost = [body for body in found if not any(other < body for other in found)]
    if not innermost:
        return None
    body = max(innermost, key=lambda body: (len(body), -min(body)))
    held = [code.instructions[i] for i in sorted(body)]
    kinds = Counter(one.kind for one in held)
    opcodes = Counter(one.opcode for one in held)
    ordered = dict(sorted(opcodes.items(), key=lambda item: (-item[1], item[0])))
    return Loop(len(held), {kind: kinds[kind] for kind in KINDS}, ordered)


def _has(code: Code, body: frozenset[int], kind: str) -> bool:
    return any(code.instructions[i].kind == kind for i in body)


def loops(code: Code, entry: str) -> list[frozenset[int]]:
    """The natural loops reachable from label `entry`, one a header, as indices of instructions."""
    after = _graph(code, code.labels[entry])
    before: dict[int, list[int]] = {block: [] for block in after}
    for block, (_, targets) in after.items():
        for target in targets:
            before[target].append(block)
    dominators = _dominators(code.labels[entry], before, lambda block: after[block][1])
    found: dict[int, set[int]] = {}
    for block, (_, targets) in after.items():
        for head in targets:
            if head in dominators[block]:
                found.setdefault(head, set()).update(_body(head, block, before))
    spans = (
        {i for block in body for i in range(block, after[block][0])} for body in found.values()
    )
    return sorted((frozenset(span) for span in spans), key=min)


def _graph(code: Code, start: int) -> dict[int, tuple[int, list[int]]]:
    """First index of each reachable basic block -> (index behind its last, blocks that follow)."""
    ends = {i + 1 for i, one in enumerate(code.instructions) if one.targets or not one.falls}
    leaders = ends | set(code.labels.values())
    graph: dict[int, tuple[int, list[int]]] = {}
    todo = [start]
    while todo:
        block = todo.pop()
        if block in graph or block >= len(code.instructions):
            continue
        end = block + 1
        while end < len(code.instructions) and end not in leaders:
            end += 1
        last = code.instructions[end - 1]
        following = [code.labels[target] for target in last.targets if target in code.labels]
        following += [end] if last.falls else []
        graph[block] = (end, following)
        todo += following
    inside = {block: [t for t in targets if t in graph] for block, (_, targets) in graph.items()}
    return {block: (graph[block][0], inside[block]) for block in sorted(graph)}


def _dominators(
    start: int, before: dict[int, list[int]], after: Callable[[int], list[int]]
) -> dict[int, set[int]]:
    """block -> the blocks on every way from `start` to it, itself among them."""
    every = set(before)
    dominators = dict.fromkeys(before, every) | {start: {start}}
    order = list(_order(start, after))
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            held = set.intersection(*(dominators[other] for other in before[block])) | {block}
            changed |= held != dominators[block]
            dominators[block] = held
    return dominators


def _order(start: int, after: Callable[[int], list[int]]) -> Iterator[int]:
    """Reverse postorder, in which one or two rounds settle the dominators."""
    seen, done = {start}, []
    stack = [(start, iter(after(start)))]
    while stack:
        block, rest = stack[-1]
        step = next((target for target in rest if target not in seen), None)
        if step is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(after(step))))
    return reversed(done)


def _body(head: int, tail: int, before: dict[int, list[int]]) -> set[int]:
    """The blocks that reach `tail` without passing `head`, and both."""
    body, todo = {head, tail}, [tail] if tail != head else []
    while todo:
        for block in before[todo.pop()]:
            if block not in body:
                body.add(block)
                todo.append(block)
    return body
