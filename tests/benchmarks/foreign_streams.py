"""Public packages of residual streams and depth attention: the blocks recognised, their sums, products and profile.

    python -m tests.benchmarks.foreign_streams

Needs hyper-connections, mhc-pytorch and attn-res, which are none of the project's: a line says where one is
missing. Networks of eight blocks on states (2, 5, 32), parameters moved away from their start.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resode.analysis import DepthRow, depth_attention, profile_depth, stream_mixing
from resode.shortcuts import HyperConnection, to_streams

SIZE, BLOCKS, STREAMS = 32, 8, 4


def branch() -> nn.Module:
    """F."""
    return nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 2 * SIZE), nn.GELU(), nn.Linear(2 * SIZE, SIZE))


class Streams(nn.Module):
    """Blocks between what makes the streams of a state and what makes one of them again."""

    def __init__(self, spread: Callable[[Tensor], Tensor], blocks: list[nn.Module]) -> None:
        super().__init__()
        self.spread, self.blocks = spread, nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The streams after the last block."""
        x = self.spread(x)
        for block in self.blocks:
            x = block(x)
        return x


def networks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and what makes the network."""

    def hyper(place: str) -> nn.Module:
        make, spread, _ = importlib.import_module(place).get_init_and_expand_reduce_stream_functions(
            STREAMS, dim=SIZE
        )
        return Streams(spread, [make(branch=branch(), layer_index=i) for i in range(BLOCKS)])

    def within() -> nn.Module:
        block = importlib.import_module("mhc").ManifoldHyperConnections
        return nn.Sequential(*[block(SIZE, STREAMS, branch()) for _ in range(BLOCKS)])

    def ours(manifold: bool) -> nn.Module:
        blocks: list[nn.Module] = [
            HyperConnection(branch(), STREAMS, manifold=manifold) for _ in range(BLOCKS)
        ]
        return Streams(lambda x: to_streams(x, STREAMS), blocks)

    yield "hyper-connections", lambda: hyper("hyper_connections")
    yield (
        "hyper-connections, manifold",
        lambda: hyper("hyper_connections.manifold_constrained_hyper_connections"),
    )
    yield "mhc-pytorch", within
    yield "resode", lambda: ours(False)
    yield "resode, manifold", lambda: ours(True)


def attending(mode: str) -> nn.Module:
    """attn-res's transformer of eight layers."""
    package = importlib.import_module("attn_res")
    config = package.TransformerConfig(
        d_model=SIZE, n_layers=BLOCKS, n_heads=2, n_kv_heads=2, vocab_size=32, max_seq_len=16,
        attn_res_mode=package.AttnResMode(mode), n_blocks=4,
    )  # fmt: skip
    return package.AttnResTransformer(config)


def moved(network: nn.Module) -> nn.Module:
    """Parameters that start at 0, and those of the mixing, away from their start."""
    for name, parameter in network.named_parameters():
        if "branch" not in name and ".block." not in name and "embed" not in name:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def profiled(network: nn.Module, x: Tensor) -> tuple[list[DepthRow], float]:
    """The depth profile's rows, and how far eigenvalues and σ_max are from dense float64 ones, over σ_max."""
    rows = profile_depth(network.eval(), x, spectra=1, lesions=False).rows
    wide, worst = copy.deepcopy(network).double(), 0.0
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, args[0].detach())

        return hook

    for row in rows:
        wide.get_submodule(row.name).register_forward_pre_hook(keep(row.name))
    wide(x.double())
    for row in rows:
        block, state = wide.get_submodule(row.name), seen[row.name]
        jac = torch.autograd.functional.jacobian(block, state).reshape(state.numel(), -1)
        eigenvalues = torch.linalg.eigvals(jac) - 1
        top = torch.linalg.matrix_norm(jac, 2).item()
        gaps = (
            row.rightmost.real - eigenvalues.real.max().item(),
            row.leftmost.real - eigenvalues.real.min().item(),
            abs(row.largest) - eigenvalues.abs().max().item(),
            row.sigma_max - top,
        )
        worst = max(worst, *(abs(gap) / top for gap in gaps))
    return rows, worst


def main() -> None:
    """Prints a line a network."""
    x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(0))
    for name, make in networks():
        torch.manual_seed(0)
        try:
            network = moved(make())
        except ImportError as error:
            print(f"{name}: not there ({error})")
            continue
        start = time.process_time()
        found = stream_mixing(network, x)
        seconds = time.process_time() - start
        rows, off = profiled(network, x[:1])
        print(
            f"{name:<28} {len(found.names)} of {BLOCKS} blocks, {found.mixing[0].shape[-1]} streams, row sums off by "
            f"{max(found.row_error):.1e}, column sums by {max(found.column_error):.1e}, norm of the product "
            f"{found.norms()[-1]:.4f}, residue {max(found.residue):.0e}, {seconds:.2f} s; {len(rows)} rows of the "
            f"depth profile, rightmost {rows[0].rightmost.real:.3f} to {rows[-1].rightmost.real:.3f}, σ_max "
            f"{rows[0].sigma_max:.2f} to {rows[-1].sigma_max:.2f}, {off:.0e} from dense"
        )
    for mode in ("full", "block"):
        torch.manual_seed(0)
        try:
            network = moved(attending(mode))
        except ImportError as error:
            print(f"attn-res: not there ({error})")
            continue
        seen = depth_attention(network, torch.randint(0, 32, (2, 5)))
        print(
            f"attn-res, {mode:<18} {len(seen.names)} of {BLOCKS} readers of up to {seen.weights.shape[1]} "
            f"sources, weights sum to 1 within {(seen.weights.sum(1) - 1).abs().max():.0e}, residue "
            f"{max(seen.residue):.0e}"
        )


if __name__ == "__main__":
    main()
