"""Networks by name: ResNets, ODE-ResNets, plain and highway networks, perceptrons, and older rivals."""

from resode.networks.architecture import Group, architecture
from resode.networks.common import StochasticDepth, Style
from resode.networks.comparators import DeeplySupervisedNet, FitNet, Maxout, MaxoutNet, NetworkInNetwork
from resode.networks.imagenet import ImageNetPreActResNet, ImageNetResNet
from resode.networks.odenet import ODENet, preact_names
from resode.networks.perceptron import PlainMLP, ResidualMLP
from resode.networks.registry import FAMILIES, NETWORKS, Family, Network, available, build, find
from resode.networks.resnet import CifarResNet, HighwayNet, PreActResNet
from resode.networks.weights import load_weights, read_weights
from resode.state_dicts import WeightsMismatch

__all__ = [
    "FAMILIES",
    "NETWORKS",
    "CifarResNet",
    "DeeplySupervisedNet",
    "Family",
    "FitNet",
    "Group",
    "HighwayNet",
    "ImageNetPreActResNet",
    "ImageNetResNet",
    "Maxout",
    "MaxoutNet",
    "Network",
    "NetworkInNetwork",
    "ODENet",
    "PlainMLP",
    "PreActResNet",
    "ResidualMLP",
    "StochasticDepth",
    "Style",
    "WeightsMismatch",
    "architecture",
    "available",
    "build",
    "find",
    "load_weights",
    "preact_names",
    "read_weights",
]
