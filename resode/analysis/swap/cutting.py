r"""A module's graph, cut where it adds x + F(x).

A residual block is a sum y = x + f of which f is computed from x: the nodes on the way from x to f are F's.
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

from resode.analysis.swap.capture import CHECKS, Uncuttable, capture
from resode.calls import ModuleCall

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACT = (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_")
_NEUTRAL = re.compile(
    r"^(dropout\w*|identity|droppath|stochasticdepth|view|reshape|permute|transpose|contiguous|clone|to|float|type)$",
    re.I,
)
_ACTIVATION = re.compile(
    r"norm|relu|[gscm]elu|^elu|silu|swish|mish|tanh|sigmoid|softplus|softsign|softmax|threshold|clamp|shrink",
    re.I,
)
_WEIGHTED = re.compile(r"conv|linear|matmul|mm$|einsum|attention|embedding|bilinear", re.I)


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
        return run[0].x.op == "placeholder" and used == [run[-1].y] and len(run[0].x.users) <= _uses(run[0])

    def state_in(self) -> Tensor:
        """The state that the module was called with, where it is whole."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        return self.call.tensors()[places.index(self.runs[0][0].x)]

    def state_out(self) -> Tensor | None:
        """The state that it gave back, likewise."""
        return self.call.y


def _uses(block: Block) -> int:
    inside = block.inside()
    return sum(user in inside for user in block.x.users)


def cut(
    name: str, owner: nn.Module, opened: Iterable[nn.Module], calls: Mapping[nn.Module, ModuleCall]
) -> Cut:
    """The module's forward as a graph, and its residual blocks.

    Args:
        name: the module's; "" for the whole network, in which an activation may follow the last block.
        owner: the module, in eval mode.
        opened: the modules within it whose forward is written down too.
        calls: how the network's modules were called.

    Raises:
        Uncuttable: it is called more than once, with objects that keep a state, or its forward cannot be
            written down.
    """
    call = calls[owner]
    if call.count > 1:
        raise Uncuttable(SHARED.format(part=name, count=call.count))
    graph = capture(owner, opened, call)
    return _in_blocks(name, owner, calls, graph)


def _in_blocks(name: str, owner: nn.Module, calls: Mapping[nn.Module, ModuleCall], graph: fx.Graph) -> Cut:
    found: dict[fx.Node, Block] = {}
    for node in graph.nodes:
        block = _block(node, owner, found)
        if block is not None:
            found[node] = block
    refused: list[str] = []
    kept: list[Block] = []
    for block in found.values():
        top = not name and not any(POST_ACTIVATION in reason for reason in refused)
        reason = _shared(block, owner, calls) or _no_step(block, list(found.values()), owner, top)
        if reason:
            refused.append(reason)
        else:
            kept.append(block)
    return Cut(name, owner, calls[owner], graph, _runs(kept), refused)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """The two nodes that a node adds, and the factor of the second."""
    if node.op not in ("call_function", "call_method") or len(node.args) < 2:
        return None
    adds, subtracts = node.target in _ADD, node.target in _SUBTRACT
    first, second = node.args[:2]
    alpha = node.kwargs.get("alpha", 1)
    if not (adds or subtracts) or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    seen = first.meta.get("seen")
    if seen is None or seen != second.meta.get("seen") or not seen[1].is_floating_point or not seen[0]:
        return None
    if not isinstance(alpha, int | float):
        return None
    return first, second, (1.0 if adds else -1.0) * alpha


def _block(node: fx.Node, owner: nn.Module, found: dict[fx.Node, Block]) -> Block | None:
    operands = _operands(node)
    if operands is None:
        return None
    first, second, factor = operands
    for (x, f), sign in zip(permutations((first, second)), (factor, 1.0), strict=True):
        if x is second and factor != 1:
            continue  # F(x) − x is no residual step
        views = []
        while x.op == "call_module" and _is_identity(owner.get_submodule(str(x.target))):
            views.append(x)
            [x] = x.all_input_nodes
        block = Block(x, [node], [(f, sign)], views)
        merged = found.get(x)
        if merged is not None and list(x.users) == [node] and x not in _before(f):
            sums, increments = [*merged.sums, node], [*merged.increments, (f, sign)]
            block = Block(merged.x, sums, increments, [*merged.views, *views])
        else:
            merged = None
        _fill(block)
        if block.nodes and f in block.nodes and _has_weights(block.nodes, owner):
            if merged is not None:
                del found[x]
            return block
    return None


def _is_identity(module: nn.Module) -> bool:
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


def _has_weights(nodes: Sequence[fx.Node], owner: nn.Module) -> bool:
    for node in nodes:
        if node.op == "call_module":
            if next(owner.get_submodule(str(node.target)).parameters(), None) is not None:
                return True
        elif node.op == "get_attr" and node.target != "training":
            return True
        elif node.op != "placeholder" and _WEIGHTED.search(_called(node, owner)):
            return True
    return False


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
