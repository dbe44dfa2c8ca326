"""Data sets as one tensor on the device, and their batches."""

from resode.training.data.archives import DataError
from resode.training.data.batches import Batches
from resode.training.data.datasets import DATASETS, ImageData, load_data

__all__ = ["DATASETS", "Batches", "DataError", "ImageData", "load_data"]
