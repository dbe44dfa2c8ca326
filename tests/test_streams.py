"""Residual streams: what blocks are at the start, their sums, products, limits, inverses, and their analysis."""

import math

import pytest
import torch
from torch import nn

from resode.analysis import count, depth_attention, map_limit, profile_depth, stream_mixing
from resode.shortcuts import (
    AdditiveCoupling,
    AttentionResidual,
    HyperConnection,
    MomentumStack,
    NotInvertible,
    doubly_stochastic,
    from_streams,
    invertible_depth,
    to_streams,
)

KINDS = {
    "static": {},
    "dynamic": {"dynamic": True, "features": 6},
    "manifold": {"manifold": True},
    "dynamic manifold": {"dynamic": True, "manifold": True, "features": 6},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mlp(size=6):
    return nn.Sequential(nn.Linear(size, 9), nn.Tanh(), nn.Linear(9, size))


def disturbed(block):
    """Every parameter away from its start, so that nothing is the identity."""
    for parameter in block.parameters():
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return block


# Doubly stochastic matrices.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1, 5, 20])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_rows_and_columns_sum_to_one(n, scale, dtype):
    """Within 1e-6, also where logits lie 100 apart and sweeps alone would need thousands."""
    a = doubly_stochastic(scale * torch.randn(50, n, n, dtype=dtype))
    assert a.dtype == dtype and (a >= 0).all()
    assert (a.sum(-1) - 1).abs().max() <= 1e-6 and (a.sum(-2) - 1).abs().max() <= 1e-6


def test_two_by_two_by_hand():
    """[[p, 1 − p], [1 − p, p]] with p²/(1 − p)² = e^(a + d − b − c), since scalings leave that ratio."""
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.4]], dtype=torch.float64)
    ratio = math.exp((0.3 + 0.4 - 2.0 + 1.0) / 2)
    p = ratio / (1 + ratio)
    assert torch.allclose(
        doubly_stochastic(logits), torch.tensor([[p, 1 - p], [1 - p, p]]).double(), atol=1e-12
    )


def test_its_gradient_is_that_of_the_limit():
    logits = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(doubly_stochastic, (logits,))


def test_logits_that_have_no_matrix_are_refused():
    with pytest.raises(ValueError, match=r"is square: got logits of shape \(2, 3\)"):
        doubly_stochastic(torch.zeros(2, 3))
    with pytest.raises(ArithmeticError, match="were not reached"):
        doubly_stochastic(torch.full((2, 2), math.nan))


# Blocks.


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_copies_stay_copies_of_the_residual_block(kind):
    block, x = HyperConnection(mlp(), 4, **KINDS[kind]), torch.randn(3, 6)
    streams = block(to_streams(x, 4))
    tolerance = 0 if kind == "static" else 3e-6
    assert torch.allclose(streams, to_streams(x + block.branch(x), 4), atol=tolerance, rtol=0)
    assert torch.allclose(from_streams(streams), x + block.branch(x), atol=3e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_its_formula(kind, shape):
    branch = nn.Tanh()
    block, x = disturbed(HyperConnection(branch, 3, **KINDS[kind])), torch.randn(2, 3, *shape)
    m = block.mixing(x)
    a, h, b = (t.expand(2, *t.shape[-k:]) for t, k in ((m.mix, 2), (m.read, 1), (m.write, 1)))
    residual = torch.tanh(torch.einsum("bj,bj...->b...", h, x))
    expected = torch.einsum("bij,bj...->bi...", a, x) + torch.einsum("bi,b...->bi...", b, residual)
    assert torch.allclose(block(x), expected, atol=1e-5)
    if "manifold" in kind:
        assert (a.sum(-1) - 1).abs().max() <= 1e-6 and (a.sum(-2) - 1).abs().max() <= 1e-6
        assert (h > 0).all() and (h < 1).all() and (b > 0).all() and (b < 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_what_a_run_counts(kind):
    block = HyperConnection(mlp(), 4, **KINDS[kind])
    counted, formula = count(block, torch.randn(1, 4, 6)), block.cost((4, 6))
    assert (counted.parameters, counted.macs) == (formula.parameters, formula.macs)


def test_costs_of_the_others():
    couple, moving = AdditiveCoupling(mlp(3), mlp(3)), MomentumStack([mlp(), mlp()])
    attending = AttentionResidual([mlp(), mlp(), mlp()], 6)
    for module in (couple, moving, attending):
        counted, formula = count(module, torch.randn(1, 6)), module.cost((6,))
        assert (counted.parameters, counted.macs) == (formula.parameters, formula.macs)


def test_what_a_block_cannot_take_is_named():
    with pytest.raises(ValueError, match=r"states of 4 streams.*got x \(8, 6\).*unfold them, x.unflatten"):
        HyperConnection(mlp())(torch.zeros(8, 6))
    with pytest.raises(ValueError, match="streams must be"):
        HyperConnection(mlp(), 0)
    with pytest.raises(ValueError, match="give features="):
        HyperConnection(mlp(), dynamic=True)
    with pytest.raises(ValueError, match="built for features=6"):
        HyperConnection(mlp(7), dynamic=True, features=6)(torch.zeros(2, 4, 7))
    with pytest.raises(ValueError, match="weights are those of a state"):
        HyperConnection(mlp(), dynamic=True, features=6).mixing()
    with pytest.raises(ValueError, match="at least one branch"):
        AttentionResidual([], 6)


def test_graphs_and_compilers_take_streams():
    network = nn.Sequential(*[disturbed(HyperConnection(mlp(), 2, manifold=True)) for _ in range(2)])
    x = torch.randn(3, 2, 6)
    traced = torch.fx.symbolic_trace(nn.Sequential(disturbed(HyperConnection(mlp(), 2))))
    assert traced(x).shape == x.shape
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), network(x), atol=1e-5)


# Depth attention of our own.


def test_attention_residual_is_its_formula():
    network, x = disturbed(AttentionResidual([mlp(), mlp()], 6)), torch.randn(3, 6)
    values = [x]
    alpha = network.attention(x)
    for layer in range(3):
        read = sum(alpha[:, layer, i, None] * v for i, v in enumerate(values))
        if layer < 2:
            values.append(network.branches[layer](read))
    assert torch.allclose(network(x), read, atol=1e-5)
    assert torch.allclose(alpha.sum(2), torch.ones(3, 3), atol=1e-6) and (alpha.triu(1) == 0).all()
    logits = torch.stack(values, 1)
    logits = logits / logits.square().mean(-1, keepdim=True).add(1e-6).sqrt() @ network.query[2]
    assert torch.allclose(alpha[:, 2], logits.softmax(1), atol=1e-5)
    images = AttentionResidual([nn.Conv2d(6, 6, 3, padding=1)], 6)
    assert images(torch.randn(2, 6, 4, 4)).shape == (2, 6, 4, 4)


# Step maps.


def test_step_limits_of_streams_coupling_and_momentum():
    """Streams that start as copies: Euler's 2. Momentum 2(1 + γ)/(1 − γ). A coupling: 2 on the imaginary axis."""
    for kind in ("static", "manifold"):
        mixing = HyperConnection(mlp(), 4, **KINDS[kind]).double().mixing()
        assert map_limit(mixing.step_matrix) == pytest.approx(2, rel=1e-3)
    for gamma in (0.0, 0.5, 0.9):
        limit = map_limit(MomentumStack([mlp()], gamma).step_matrix)
        assert limit == pytest.approx(2 * (1 + gamma) / (1 - gamma), rel=1e-6)
    coupling = AdditiveCoupling(mlp(), mlp()).step_matrix
    assert map_limit(coupling, 1j) == pytest.approx(2, rel=1e-6) and map_limit(coupling, -1.0) == 0
    assert map_limit(lambda z: torch.zeros(2, 2)) == math.inf


@pytest.mark.parametrize("z", [-0.3, 0.2 + 0.5j])
def test_step_matrices_are_the_maps_jacobians(z):
    """Of blocks whose branch multiplies by z."""

    class Times(nn.Module):
        def forward(self, x):
            return z * x

    if isinstance(z, float):
        block = disturbed(HyperConnection(Times(), 3)).double()
        basis = torch.eye(3, dtype=torch.float64)[..., None]  # three samples of three streams
        assert torch.allclose(block(basis)[..., 0].mT, block.mixing().step_matrix(z))
    coupling = AdditiveCoupling(Times(), Times())
    assert torch.allclose(coupling(torch.eye(2, dtype=torch.complex128)).mT, coupling.step_matrix(z))
    moving = MomentumStack([Times()], 0.7)
    x_only = moving.states(torch.ones(1, 1, dtype=torch.complex128))[0]
    assert torch.allclose(x_only, moving.step_matrix(z)[:, 0])


# Inverses.


def test_couplings_and_momentum_are_undone():
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        x = torch.randn(4, 6, dtype=dtype)
        blocks = [AdditiveCoupling(mlp(3), mlp(3)).to(dtype) for _ in range(10)]
        y = x
        for block in blocks:
            y = block(y)
        for block in reversed(blocks):
            y = block.inverse(y)
        assert torch.allclose(y, x, atol=tol)
        stack = MomentumStack([mlp() for _ in range(10)], 0.9).to(dtype)
        back = stack.inverse(stack.states(x))
        assert torch.allclose(back[:, :6], x, atol=tol) and back[:, 6:].abs().max() < tol


def test_momentum_beyond_its_depth_is_refused_and_rightly():
    """γ = 0.9 in float32: 85 blocks to 1e-3. At 200 the inverse without the check is wrong by more than that."""
    assert invertible_depth(0.9) == pytest.approx(
        math.log(1e-3 / torch.finfo(torch.float32).eps) / -math.log(0.9)
    )
    assert (invertible_depth(0.0), invertible_depth(1.0)) == (0, math.inf)
    x = torch.randn(4, 6)
    deep = MomentumStack([mlp() for _ in range(200)], 0.9)
    with pytest.raises(
        NotInvertible, match=r"of 200 blocks multiplies rounding by 0.9\^-200.*at most 85 blocks"
    ):
        deep.inverse(deep.states(x))
    wrong = deep._inverse(deep.states(x))
    assert not (wrong[:, :6] - x).norm() / x.norm() < 1e-3
    shallow = MomentumStack([mlp() for _ in range(60)], 0.9)
    assert torch.allclose(shallow.inverse(shallow.states(x))[:, :6], x, atol=1e-2)


def test_a_coupling_whose_inverse_is_all_rounding_is_refused():
    """Slopes of 300: each coupling multiplies errors by some 10⁵ on the way back."""
    steep = nn.Linear(3, 3, bias=False)
    nn.init.eye_(steep.weight)
    steep.weight.data *= 300
    x = torch.randn(4, 6)

    class Two(AdditiveCoupling):
        def _inverse(self, y):
            return super()._inverse(super()._inverse(y))

    block = Two(steep, steep)
    with pytest.raises(NotInvertible, match=r"by rounding alone, above 0.001"):
        block.inverse(block(block(x)))


# Analysis.


@pytest.mark.parametrize("kind", KINDS)
def test_mixing_is_found_without_reading_the_block(kind):
    """By least squares, against what the blocks themselves say."""
    blocks = [disturbed(HyperConnection(mlp(), 3, **KINDS[kind])) for _ in range(4)]
    network, x = nn.Sequential(*blocks), torch.randn(5, 3, 6)
    found = stream_mixing(network, x)
    state = x
    for block, a in zip(blocks, found.mixing, strict=True):
        assert torch.allclose(a, block.mixing(state).mix.double().expand_as(a), atol=1e-4)
        state = block(state)
    assert found.names == ("0", "1", "2", "3") and max(found.residue) < 1e-4
    product = found.mixing[3] @ found.mixing[2] @ found.mixing[1] @ found.mixing[0]
    assert found.norms()[-1] == pytest.approx(torch.linalg.matrix_norm(product, 2).max().item())
    assert found.gains().shape == (4, 3)
    if "manifold" in kind:
        assert max(*found.row_error, *found.column_error) < 1e-6
        assert found.norms()[-1] == pytest.approx(1, abs=1e-4)
    assert str(found).splitlines()[0].split() == [
        "block",
        "streams",
        "rows",
        "-",
        "1",
        "columns",
        "-",
        "1",
        "‖product‖",
        "residue",
    ]
    assert found.to_csv().splitlines()[0] == "block,streams,row_error,column_error,norm,residue"


class Folded(nn.Module):
    """Someone else's block: streams folded into the batch, a matrix a position, another branch's name."""

    def __init__(self, streams, size):
        super().__init__()
        self.num_residual_streams = streams
        self.layer = mlp(size)
        self.mix = nn.Parameter(torch.randn(streams, streams))
        self.gate = nn.Linear(size, 1)

    def matrices(self, x):  # (B, T, n, n)
        return self.mix * torch.sigmoid(self.gate(x).mean(1))[..., None]

    def forward(self, folded):
        x = folded.unflatten(0, (-1, self.num_residual_streams))  # (B, n, T, d)
        mixed = torch.einsum("btij,bjtd->bitd", self.matrices(x), x)
        return (mixed + self.layer(x.mean(1))[:, None]).flatten(0, 1)


def test_streams_folded_into_the_batch_are_unfolded():
    network = nn.Sequential(*[Folded(3, 6) for _ in range(2)])
    x = torch.randn(2, 5, 6)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = network

        def forward(self, x):
            return self.blocks(x.repeat_interleave(3, 0)).unflatten(0, (-1, 3)).sum(1)

    found = stream_mixing(Whole(), x)
    assert found.names == ("blocks.0", "blocks.1") and found.mixing[0].shape == (10, 3, 3)
    want = network[0].matrices(x[:, None].expand(-1, 3, -1, -1)).flatten(0, 1)
    assert torch.allclose(found.mixing[0], want.double(), atol=1e-2), "streams alike: moved by a thousandth"
    with pytest.raises(ValueError, match=r"blocks.0 has 5 streams, which a state of \(6, 5, 6\) .* not show"):
        stream_mixing(Whole(), x, blocks="blocks.*", streams=5)


def test_what_has_no_streams_is_said():
    with pytest.raises(ValueError, match="no block with streams was found"):
        stream_mixing(nn.Linear(2, 2), torch.zeros(1, 2))

    class Square(nn.Module):
        streams = 2

        def __init__(self):
            super().__init__()
            self.branch = nn.Identity()

        def forward(self, x):
            return x * x + self.branch(x)

    with pytest.raises(ValueError, match="is no mixture of 2 streams"):
        stream_mixing(Square(), torch.randn(3, 2, 8))
    with pytest.raises(ValueError, match="tells no number of streams: give streams="):
        stream_mixing(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), blocks="0")


def test_depth_attention_of_anyones_network():
    class Reader(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.query = nn.Parameter(torch.randn(size))

        def forward(self, stack):
            return ((stack @ self.query).softmax(0)[..., None] * stack).sum(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.readers = nn.ModuleList(Reader(8) for _ in range(3))
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            values = [x]
            for reader, layer in zip(self.readers, self.layers, strict=True):
                values.append(layer(reader(torch.stack(values))))
            return values[-1]

    network, x = Net(), torch.randn(4, 8)
    found = depth_attention(network, x)
    assert found.names == ("readers.0", "readers.1", "readers.2") and found.weights.shape == (3, 3)
    first = torch.stack([x, network.layers[0](x)])
    want = (first @ network.readers[1].query).softmax(0).mean(1)
    assert torch.allclose(found.weights[1, :2], want.double(), atol=1e-4) and found.weights[1, 2] == 0
    with pytest.raises(ValueError, match="no module of the model reads"):
        depth_attention(nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("kind", ["static", "manifold"])
def test_the_depth_profile_sees_a_block_of_streams_as_one(kind):
    """One addition a block on the whole state: its shortcut is A, which is no identity."""
    network = nn.Sequential(*[disturbed(HyperConnection(mlp(), 3, **KINDS[kind])) for _ in range(3)]).eval()
    rows = profile_depth(network, torch.randn(4, 3, 6), spectra=0).rows
    assert [row.name for row in rows] == ["0", "1", "2"] and {row.shape for row in rows} == {(3, 6)}
    assert {row.kind for row in rows} == {"projection"} and max(row.split_error for row in rows) < 1e-4


def dense_increment(block, state):
    """∂(M(x) − x)/∂x of one folded or plain state, (n, n)."""
    matrix = torch.autograd.functional.jacobian(lambda z: block(z) - z, state)
    return matrix.reshape(state.numel(), state.numel())


@pytest.mark.parametrize("kind", [*KINDS, "folded"])
def test_a_profile_has_a_row_for_every_block_of_streams(kind):
    """Behind a layer that makes the state, in any number of dimensions, folded into the batch or dynamic.

    Eigenvalues of M(x) − x and σ of M' are the dense ones of all streams together: with streams folded into
    the batch, those of one stream alone would be another matrix's.
    """
    n = 3
    if kind == "folded":
        blocks = [disturbed(Folded(n, 6)) for _ in range(2)]
        spread, x = (lambda z: z.repeat_interleave(n, 0)), torch.randn(1, 5, 6, dtype=torch.float64)
    else:
        blocks = [disturbed(HyperConnection(nn.Conv2d(6, 6, 1), n, **KINDS[kind])) for _ in range(2)]
        spread, x = (lambda z: to_streams(z, n)), torch.randn(1, 6, 2, 3, dtype=torch.float64)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(x.shape[-1], x.shape[-1])
            self.blocks = nn.Sequential(*blocks)

        def forward(self, z):
            return self.blocks(spread(self.first(z)))

    network = Network().double().eval()
    rows = profile_depth(network, x, spectra=1, lesions=False).rows
    assert [row.name for row in rows] == ["blocks.0", "blocks.1"]
    state = spread(network.first(x)).detach()
    for row, block in zip(rows, network.blocks, strict=True):
        jac = dense_increment(block, state)
        eigenvalues = torch.linalg.eigvals(jac)
        assert row.rightmost.real == pytest.approx(eigenvalues.real.max().item(), abs=1e-8)
        assert row.leftmost.real == pytest.approx(eigenvalues.real.min().item(), abs=1e-8)
        sigma = torch.linalg.svdvals(jac + torch.eye(len(jac), dtype=jac.dtype))
        assert row.sigma_max == pytest.approx(sigma[0].item(), abs=1e-8)
        state = block(state).detach()
