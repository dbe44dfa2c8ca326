#!/usr/bin/env bash
# torch 2.13.0: the gradient of max Re eig(J) at a Jordan block is I/n, finite, and says nothing of the truth.
#
# A guess: where eigenvalues coincide without a full set of eigenvectors, the derivative does not exist, and the result
# is infinite, NaN or an error (the documentation warns that the gradient may be numerically unstable).
# Behaviour: J = -I + N, N the shift, gives the identity over n to all digits, as for a simple mean of the diagonal,
# while moving the corner entry by e moves the eigenvalue by e^(1/n): a derivative that is infinite. A penalty on the
# spectrum that starts there sees no slope where the slope is steepest.
#
# Installs torch==2.13.0 numpy==2.3.5 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch

n = 8
jordan = (-torch.eye(n, dtype=torch.float64) + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)).requires_grad_()
torch.linalg.eigvals(jordan).real.max().backward()
gradient = jordan.grad
moved = jordan.detach().clone()
moved[-1, 0] += 1e-8
rise = torch.linalg.eigvals(moved).real.max().item() + 1
print(f"torch {torch.__version__}: largest distance of the gradient from I/{n}: "
      f"{(gradient - torch.eye(n, dtype=torch.float64) / n).abs().max():.1e}; its corner entry {gradient[-1, 0]:.1e}; "
      f"moving the corner by 1e-8 moves the eigenvalue by {rise:.3f}")
assert torch.isfinite(gradient).all() and rise > 0.05
assert (gradient - torch.eye(n, dtype=torch.float64) / n).abs().max() < 1e-6
PYTHON
