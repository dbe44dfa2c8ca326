#!/usr/bin/env bash
# torchdeq 0.1.0: the default Anderson acceleration of a linear scalar map is slower than plain iteration.
#
# A guess: Anderson acceleration of z -> 0.99 z + 0.02 is a secant method and lands on z* = 2 in a few iterations, or
# at least not behind plain iteration.
# Behaviour: after 40 iterations from 0 Anderson stands at 0.26, plain iteration at 0.66. The small system for its
# weights is regularized by an absolute number, 1e-4, against which squared residuals of 4e-4 weigh little; the result
# says that the solver took its 40 steps, as any other. Broyden in the same package is at 2 to rounding.
#
# Installs torch==2.13.0 torchdeq==0.1.0 numpy==2.3.5 scipy==1.16.3 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchdeq==0.1.0 numpy==2.3.5 scipy==1.16.3
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchdeq.solver import get_solver


def end(name):
    start = torch.zeros(1, 1, dtype=torch.float64)
    return get_solver(name)(lambda z: 0.99 * z + 0.02, start, max_iter=40, stop_mode="rel", tol=1e-12)[0].item()


anderson, plain, broyden = (end(name) for name in ("anderson", "fixed_point_iter", "broyden"))
print(f"torchdeq 0.1.0 after 40 iterations: anderson {anderson:.4f}, plain {plain:.4f}, broyden {broyden:.4f}; truth 2")
assert anderson < 0.5 < plain < 1 and abs(broyden - 2) < 1e-9
PYTHON
