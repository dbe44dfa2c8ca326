r"""Fields F: what a residual block adds to its state, x + ηF(x).

A field keeps the state's shape, so that it can be the right-hand side of dx/dt = F(x) and any
solver can advance it. It begins with its own normalization and activation (pre-activation), never
in place: the state that comes in stays as it is.

Convolutions act on images (batch, channels, height, width), dense fields on the last dimension.
"""

from resode.fields.combined import Augmented, KnownPlusLearned
from resode.fields.conv import BottleneckField, ConvField
from resode.fields.dense import MLPField
from resode.fields.parts import (
    ACTIVATIONS,
    MONOTONE,
    NORMS,
    SqueezeExcitation,
    make_activation,
    make_conv,
    make_norm,
)
from resode.fields.stable import AntisymmetricField, HamiltonianField, ParabolicField
from resode.fields.threshold import SoftThresholdField
from resode.fields.time import Autonomous, TimeConvField, TimeMLPField, append_time

__all__ = [
    "ACTIVATIONS",
    "MONOTONE",
    "NORMS",
    "AntisymmetricField",
    "Augmented",
    "Autonomous",
    "BottleneckField",
    "ConvField",
    "HamiltonianField",
    "KnownPlusLearned",
    "MLPField",
    "ParabolicField",
    "SoftThresholdField",
    "SqueezeExcitation",
    "TimeConvField",
    "TimeMLPField",
    "append_time",
    "make_activation",
    "make_conv",
    "make_norm",
]
