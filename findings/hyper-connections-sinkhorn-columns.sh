#!/usr/bin/env bash
# hyper-connections 0.4.11: the matrices of its manifold-constrained hyper-connections are not doubly stochastic.
#
# A guess: with the default 20 Sinkhorn iterations rows and columns of the residual mixing sum to 1, so that the product
# over any number of blocks has norm 1, which is what the constraint is for.
# Behaviour: rows do, columns do not where the iterations converge slowly: some logits between 0 and -9 leave 2.6e-2, and
# of normal logits of deviation 5 half leave more than 5e-3 in their worst column. The product over many equal blocks has
# norm 1.03. No warning comes.
#
# Installs torch==2.13.0 numpy==2.3.5 einops==0.8.2 torch-einops-utils==0.2.0 hyper-connections==0.4.11 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 einops==0.8.2 torch-einops-utils==0.2.0 hyper-connections==0.4.11
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from hyper_connections.manifold_constrained_hyper_connections import sinkhorn_knopps

logits = torch.tensor([[0.0, 0, -9, -9], [0, 0, -9, -9], [0, 0, 0, -9], [0, 0, 0, 0]])
mixing = sinkhorn_knopps(logits).double()  # 20 iterations, the default
rows, columns = (mixing.sum(1) - 1).abs().max().item(), (mixing.sum(0) - 1).abs().max().item()
norm = torch.linalg.matrix_norm(torch.linalg.matrix_power(mixing, 20_000), 2).item()
torch.manual_seed(0)
many = sinkhorn_knopps(5 * torch.randn(2000, 4, 4)).double()
worst = (many.sum(1) - 1).abs().amax(1)
product = torch.eye(4, dtype=torch.float64)
for matrix in many[:200]:
    product = matrix @ product
print(f"row sums off by {rows:.1e}, column sums by {columns:.1e}; norm of the power {norm:.3f}; of normal logits the median of "
      f"the worst column is off by {worst.median():.1e}, the product of 200 by {(product.sum(0) - 1).abs().max():.2f}")
assert rows < 1e-6 and 0.02 < columns < 0.03 and norm > 1.02 and worst.median() > 5e-3
PYTHON
