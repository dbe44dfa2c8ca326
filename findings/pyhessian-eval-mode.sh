#!/usr/bin/env bash
# PyHessian 0.1: the eigenvalue is that of the network in evaluation, and the network is left there.
#
# A guess: hessian(model, criterion, data).eigenvalues() is about the loss that the model gives as it is handed over,
# in training mode with batch norm by the batch, as the training step sees it; and the model is afterwards as it was.
# Behaviour: the constructor calls model.eval() for good. The largest eigenvalue is that of the loss with running
# statistics, here twice the one of the training loss, and model.training is False afterwards, so that training goes
# on with batch norm and dropout in evaluation. Neither is said.
#
# Installs torch==2.13.0 pyhessian==0.1 numpy==2.3.5 in a temporary folder, and fails where the behaviour is another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 pyhessian==0.1 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import warnings

import torch
from pyhessian import hessian
from torch import nn

warnings.simplefilter("ignore")  # torch's own about create_graph
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).train()
x, y, criterion = torch.randn(64, 5) * 3 + 2, torch.randint(3, (64,)), nn.CrossEntropyLoss()


def dense(model):
    """The largest eigenvalue, from the whole Hessian."""
    parameters = list(model.parameters())
    slope = torch.autograd.grad(criterion(model(x), y), parameters, create_graph=True)
    rows = [torch.autograd.grad(s, parameters, retain_graph=True) for s in torch.cat([g.reshape(-1) for g in slope])]
    matrix = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).double()
    return torch.linalg.eigvalsh(matrix)[-1].item()


in_training, in_evaluation = dense(copy.deepcopy(model)), dense(copy.deepcopy(model).eval())
(found,), _ = hessian(model, criterion, data=(x, y), cuda=False).eigenvalues(maxIter=500, tol=1e-6)
print(f"PyHessian 0.1: {found:.4f}; the Hessian's own in training {in_training:.4f}, in evaluation {in_evaluation:.4f}; "
      f"model.training was True and is {model.training}")
assert abs(found - in_evaluation) < 1e-3 < abs(found - in_training) and not model.training
PYTHON
