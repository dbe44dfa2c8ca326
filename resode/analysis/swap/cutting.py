r"""A module's graph, cut where it adds x + F(x).

Which sums are residual blocks y = x + f, the trace of a pass has found; additions have the same numbers in
the graph. The nodes on the way from x to f are F's.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx, nn

from resode.analysis.depth.tracing import Addition
from resode.analysis.swap.capture import CHECKS, Uncuttable, capture
from resode.calls import ModuleCall

_SUM = re.compile(r"^_*i?(?:add|(sub|subtract))_*$")
_NEUTRAL = re.compile(
    r"^(dropout\w*|identity|droppath|stochasticdepth|view|reshape|permute|transpose|contiguous|clone|to|float|type)$",
    re.I,
)
_ACTIVATION = re.compile(
    r"norm|relu|[gscm]elu|^elu|silu|swish|mish|tanh|sigmoid|softplus|softsign|softmax|threshold|clamp|shrink",
    re.I,
)


SHARED = (
    "its weights are shared: {part} is called {count} times in a pass. Give its branch to a stack by hand, "
    "as ResidualStack(branch, depth={count})"
)


POST_ACTIVATION = "follows the sum: a post-activation"


@dataclass(eq=False)
class Block:
    """x + Σ ± f, in a graph.

    Args:
        x: the node of the state.
        sums: the additions, y last.
        increments: (f, its factor in the sum).
        views: x as it came to the sum, through layers that are the identity.
        nodes: those of F, from x to every f.
        context: nodes that F reads beside x and parameters.
    """

    x: fx.Node
    sums: list[fx.Node]
    increments: list[tuple[fx.Node, float]]
    views: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    context: list[fx.Node] = field(default_factory=list)

    @property
    def y(self) -> fx.Node:
        """The node of the state after the block."""
        return self.sums[-1]

    def inside(self) -> set[fx.Node]:
        """All that a stack takes the place of."""
        return {*self.nodes, *self.views, *self.sums}


@dataclass(eq=False)
class Cut:
    """A module's graph, and its blocks in runs of which each hands its state to the next.

    Args:
        name: the module's.
        owner: the module.
        call: how it was called.
        graph: of its forward; one placeholder for each tensor among the arguments.
        runs: blocks in a row.
        refused: (block's place, why it is none), for x + F(x) that is no solver step.
    """

    name: str
    owner: nn.Module
    call: ModuleCall
    graph: fx.Graph
    runs: list[list[Block]]
    refused: list[str]

    def whole(self) -> bool:
        """Whether the module is one run from its argument to its result, and so can be joined to another."""
        if len(self.runs) != 1:
            return False
        [run] = self.runs
        output = next(iter(reversed(self.graph.nodes)))
        used = [*output.all_input_nodes]
        inside, x = run[0].inside(), run[0].x
        return x.op == "placeholder" and used == [run[-1].y] and all(user in inside for user in x.users)

    def state_in(self) -> Tensor:
        """The state that the module was called with, where it is whole."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        return self.call.tensors()[places.index(self.runs[0][0].x)]

    def state_out(self) -> Tensor | None:
        """The state that it gave back, likewise."""
        return self.call.y


def cut(
    name: str,
    owner: nn.Module,
    opened: Iterable[nn.Module],
    calls: Mapping[nn.Module, ModuleCall],
    traced: tuple[Sequence[Addition], range] | None = None,
) -> Cut:
    """The module's forward as a graph, and its residual blocks.

    Args:
        name: the module's; "" for the whole network, in which an activation may follow the last block.
        owner: the module, in eval mode.
        opened: the modules within it whose forward is written down too.
        calls: how the network's modules were called.
        traced: its residual additions, and the numbers of all its additions; None for the last of all.

    Raises:
        Uncuttable: it is called more than once, with objects that keep a state, or its forward cannot be
            written down, or adds constants.
    """
    call = calls[owner]
    if call.count > 1:
        raise Uncuttable(SHARED.format(part=name, count=call.count))
    graph = capture(owner, opened, call)
    additions, numbers = ([], range(0)) if traced is None else traced
    *_, end = graph.nodes
    if traced is not None and end.meta["sums"].stop != len(numbers):
        raise Uncuttable("its forward adds constants, which a graph holds as their sum: add them in __init__")
    sums = {
        numbers.start + node.meta["sums"].start: node
        for node in graph.nodes
        if len(node.meta.get("sums", ())) == 1
    }
    wanted = [(*a.shortcuts[a.number], a.number) for a in additions] or [(max(sums), 0, max(sums))]
    blocks = [_block(sums, first, side, last, owner) for first, side, last in wanted]
    found = [block for block in blocks if block is not None]
    refused: list[str] = []
    kept: list[Block] = []
    for block in found:
        top = not name and not any(POST_ACTIVATION in reason for reason in refused)
        reason = _shared(block, owner, calls) or _no_step(block, found, owner, top)
        if reason:
            refused.append(reason)
        else:
            kept.append(block)
    return Cut(name, owner, calls[owner], graph, _runs(kept), refused)


def _operands(node: fx.Node | None, owner: nn.Module) -> list[tuple[fx.Node, float]] | None:
    """The two nodes that an addition's node adds, and their factors; None where it does more."""
    if node is None or len(node.args) < 2 or not (found := _SUM.match(_called(node, owner))):
        return None
    first, second = node.args[:2]
    alpha = node.kwargs.get("alpha", 1)
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and isinstance(alpha, int | float)):
        return None
    if first.meta.get("seen") is None or first.meta["seen"] != second.meta.get("seen"):
        return None
    return [(first, 1.0), (second, -alpha if found[1] else alpha)]


def _block(sums: Mapping[int, fx.Node], first: int, side: int, last: int, owner: nn.Module) -> Block | None:
    """The nodes of an addition; None where it is no plain sum, or a branch is not computed from x here.

    Its sums are numbered from `first`, of which x is the operand `side`, to `last`.
    """
    node, operands = sums.get(first), _operands(sums.get(first), owner)
    if node is None or operands is None:
        return None
    block = Block(operands[side][0], [node], [operands[1 - side]])
    while _is_identity(block.x, owner):
        block.views.append(block.x)
        [block.x] = block.x.all_input_nodes
    while node is not sums.get(last):  # branches side by side
        if len(node.users) != 1:
            return None
        before, [node] = node, node.users
        if _is_identity(node, owner):
            block.views.append(node)
        elif (operands := _operands(node, owner)) is None:
            return None
        else:
            block.sums.append(node)
            block.increments += [pair for pair in operands if pair[0] is not before]
    _fill(block)
    return block if all(f in block.nodes for f, _ in block.increments) else None


def _is_identity(node: fx.Node, owner: nn.Module) -> bool:
    module = owner.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Sequential) and not len(module))


def _before(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        for other in todo.pop().all_input_nodes:
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def _fill(block: Block) -> None:
    """F's nodes, and what they read beside x."""
    graph = block.x.graph
    needed = set().union(*(_before(f) for f, _ in block.increments))
    for node in graph.nodes:
        if node is block.y:
            break
        if node.target in CHECKS and block.x in _before(node):
            needed |= _before(node)
    depends, fixed = {block.x}, set()  # on x; on parameters alone
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if any(i in depends for i in inputs):
            depends.add(node)
        elif node.op != "placeholder" and all(i in fixed for i in inputs) and node.op != "call_module":
            fixed.add(node)
    own = [node for node in graph.nodes if node in needed and node in depends and node is not block.x]
    todo, taken = list(own), set(own)
    while todo:
        for other in todo.pop().all_input_nodes:
            if other in taken or other is block.x:
                continue
            if other in fixed:
                taken.add(other)
                todo.append(other)
            elif other not in block.context:
                block.context.append(other)
    block.nodes = [node for node in graph.nodes if node in taken]


def _called(node: fx.Node, owner: nn.Module) -> str:
    """What a node does, in a word."""
    if node.op == "call_module":
        return type(owner.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _shared(block: Block, owner: nn.Module, calls: Mapping[nn.Module, ModuleCall]) -> str:
    """Why other blocks' weights are this one's, or ''."""
    targets = [str(node.target) for node in block.nodes if node.op == "call_module"]
    for target in dict.fromkeys(targets):
        part = owner.get_submodule(target)
        if (
            part in calls
            and calls[part].count > targets.count(target)
            and next(part.parameters(), None) is not None
        ):
            return SHARED.format(part=target, count=calls[part].count)
    return ""


def _no_step(block: Block, blocks: list[Block], owner: nn.Module, top: bool) -> str:
    """Why x + F(x) is no step of a solver here, or ''."""
    inside = block.inside()
    outer = {
        user for node in block.nodes if node.op != "get_attr" for user in node.users if user not in inside
    }
    if outer:
        return "what its branch computes is used outside it, too"
    chained = any(other.y is block.x for other in blocks)
    node = block.y
    while len(node.users) == 1:
        [user] = node.users
        called = "" if user.op == "output" else _called(user, owner)
        if _NEUTRAL.match(called):
            node = user
            continue
        if _ACTIVATION.search(called) and not chained and (not top or _goes_on(user, blocks, owner)):
            return (
                f"{called} {POST_ACTIVATION} block g(x + F(x)) is no Euler step of an ODE in x, so no other "
                "solver belongs to it"
            )
        break
    return ""


def _goes_on(node: fx.Node, blocks: list[Block], owner: nn.Module) -> bool:
    """Whether the next block's state is this node, or a view of it."""
    while True:
        if any(block.x is node for block in blocks):
            return True
        following = [
            user for user in node.users if user.op != "output" and _NEUTRAL.match(_called(user, owner))
        ]
        if len(following) != 1:
            return False
        [node] = following


def _runs(blocks: list[Block]) -> list[list[Block]]:
    """Blocks in rows: each reads its predecessor's state, which nothing else reads."""
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and block.x is runs[-1][-1].y and set(block.x.users) <= block.inside():
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def common_factor(blocks: Sequence[Block]) -> float:
    """The number c > 0 that every block of a run multiplies its branch by, taken out of them; else 1."""
    found = [_factor(block) for block in blocks]
    if len({c for c, _ in found}) != 1 or found[0][0] == 1:
        return 1.0
    for block, (_, f) in zip(blocks, found, strict=True):
        [(scaled, _)] = block.increments
        block.increments = [(f, 1.0)]
        if scaled is not f:
            block.nodes.remove(scaled)
            block.sums.insert(0, scaled)
    return found[0][0]


def _factor(block: Block) -> tuple[float, fx.Node]:
    """The number c and the node f of a block x + cf."""
    f, factor = block.increments[0]
    if len(block.increments) > 1 or factor <= 0:
        return 1.0, f
    if (
        factor == 1
        and f.target in (operator.mul, torch.mul, "mul")
        and len(f.users) == 1
        and len(f.args) == 2
    ):
        for c, other in permutations(f.args):
            if isinstance(c, int | float) and c > 0 and isinstance(other, fx.Node) and other in block.nodes:
                return float(c), other
    return factor, f


def branch(block: Block, owner: nn.Module) -> nn.Module:
    """F as a module of x and the context; its parts are the owner's own."""
    graph = fx.Graph()
    copies = {block.x: graph.placeholder("x")}
    for i, node in enumerate(block.context):
        copies[node] = graph.placeholder(f"context_{i}")
    for node in block.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    total: Any = None
    for f, factor in block.increments:
        value = copies[f] if abs(factor) == 1 else graph.call_function(operator.mul, (copies[f], abs(factor)))
        if total is None:
            total = value if factor > 0 else graph.call_function(operator.neg, (value,))
        else:
            total = graph.call_function(operator.add if factor > 0 else operator.sub, (total, value))
    graph.output(total)
    [first, *rest] = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    if not rest and not block.context and first.op == "call_module" and first.args == (copies[block.x],):
        if not first.kwargs:
            return owner.get_submodule(str(first.target))
    return fx.GraphModule(owner, graph, class_name="Branch")


def replaced(part: Cut, modules: Sequence[tuple[str, nn.Module]]) -> nn.Module:
    """The module's graph with (name, module) called in place of each run, as module(x, *contexts)."""
    holder = nn.Module()
    ends: dict[fx.Node, fx.Node] = {}  # of earlier runs, in whose place a call stands now
    for run, (name, module) in zip(part.runs, modules, strict=True):
        graph, y = part.graph, run[-1].y
        inside = set().union(*(b.inside() for b in run))
        read = [run[0].x, *(node for block in run for node in block.context)]
        with graph.inserting_before(y):
            call = graph.create_node("call_module", name, tuple(ends.get(node, node) for node in read))
        ends[y] = call
        y.replace_all_uses_with(call)
        for node in reversed(list(graph.nodes)):
            if node in inside and not node.users:
                graph.erase_node(node)
        holder.add_module(name, module)
    return _finished(part, holder)


def _finished(part: Cut, holder: nn.Module) -> nn.Module:
    names = {str(n.target) for n in part.graph.nodes if n.op in ("call_module", "get_attr")}
    attributes: dict[str, Any] = {}
    for name in names:
        source: Any = holder if name in holder._modules else part.owner
        for atom in name.split("."):
            source = getattr(source, atom)
        attributes[name] = source
    return fx.GraphModule(attributes, part.graph, class_name=type(part.owner).__name__)
