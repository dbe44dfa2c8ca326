#!/usr/bin/env bash
# torchdyn 1.0.6: its fixed-step `rk4` is of order 1 where the field depends on time.
#
# A guess: a method called rk4 halves its step to a sixteenth of the error, for f(t, x) as for f(x).
# Behaviour: for x' = x it is (ratio about 16). For x' = cos(3t) + 0·x halving the step halves the error, because the
# stages are taken at times that are shifted against the tableau's.
#
# Installs torch==2.13.0 torchdyn==1.0.6 torchdiffeq==0.2.5 numpy==2.3.5 scipy==1.16.3 torchsde==0.2.6 pytorch-lightning==2.5.6 torchcde==0.2.5 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchdyn==1.0.6 torchdiffeq==0.2.5 numpy==2.3.5 scipy==1.16.3 torchsde==0.2.6 pytorch-lightning==2.5.6 torchcde==0.2.5
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
from torchdyn.numerics import odeint

F64 = torch.float64


def ratio(field, exact):
    errors = []
    for n in (32, 64):
        t = torch.linspace(0, 1, n + 1, dtype=F64)
        _, path = odeint(field, torch.ones(1, 1, dtype=F64), t, solver="rk4")
        errors.append(abs(path[-1].item() - exact))
    return errors[0] / errors[1]


autonomous = ratio(lambda t, x: x, math.e)
timed = ratio(lambda t, x: torch.cos(3 * t) + 0 * x, 1 + math.sin(3) / 3)
print(f"torchdyn 1.0.6 rk4: halving the step divides the error by {autonomous:.2f} for x' = x, by {timed:.2f} for x' = cos 3t")
assert 14 < autonomous < 18 and 1.8 < timed < 2.2
PYTHON
