#!/usr/bin/env bash
# torchdiffeq 0.2.5: `explicit_adams` with its default order diverges on y' = -y over output times 0.1 apart.
#
# A guess: a method of Adams that is given steps of 0.1 on y' = -y is well inside its region, as the one of order 4 is.
# Behaviour: the order climbs to 12 by default, whose region ends far below 0.1; the answer is of size 1e30, and
# neither an error nor a warning comes. options={'max_order': 4} gives exp(-10) to 1e-6.
#
# Installs torch==2.13.0 torchdiffeq==0.2.5 numpy==2.3.5 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchdiffeq==0.2.5 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
import torchdiffeq
from torchdiffeq import odeint

warnings.simplefilter("error", UserWarning)
t = torch.linspace(0, 10, 101, dtype=torch.float64)
y0 = torch.ones(1, dtype=torch.float64)
default, fourth = (
    odeint(lambda t, y: -y, y0, t, method="explicit_adams", options=options)[-1].item()
    for options in (None, {"max_order": 4})
)
print(f"torchdiffeq {torchdiffeq.__version__}: y(10) = {default:.3g} by default, {fourth:.6g} with max_order=4; "
      f"truth {torch.exp(torch.tensor(-10.0)).item():.6g}")
assert abs(default) > 1e20 and abs(fourth - 4.539993e-05) < 1e-6
PYTHON
