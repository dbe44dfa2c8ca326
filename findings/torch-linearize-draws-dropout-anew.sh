#!/usr/bin/env bash
# torch 2.13.0: torch.func.linearize of a field with dropout in training draws a new mask at each push.
#
# A guess: a linearization is one linear map; pushing the same vector twice gives the same, and pushing 2v gives twice
# what v gives, as with torch.func.jvp under one seed, or as with a vjp function, which keeps its mask.
# Behaviour: two pushes of one vector differ, so that Krylov methods built on it see another matrix at each step. No
# error comes, and no warning that speaks of it.
#
# Installs torch==2.13.0 numpy==2.3.5 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
field = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train()
x, v = torch.randn(2, 64)
for parameter in field.parameters():
    parameter.requires_grad_(False)
_, push = torch.func.linearize(field, x)
first, second = push(v), push(v)
_, pull = torch.func.vjp(field, x)
same = torch.equal(pull(v)[0], pull(v)[0])
differs = (first - second).norm() / first.norm()
print(f"torch {torch.__version__}: two pushes of one vector differ by {differs:.2f} of its size; a vjp function's pulls are "
      f"{'equal' if same else 'not equal'}")
assert differs > 0.1 and same
PYTHON
