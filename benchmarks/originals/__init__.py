"""Loaders of the public originals: the papers' data sets, for whoever has downloaded them."""

from benchmarks.originals.av_mnist import av_mnist
from benchmarks.originals.clips import ClipData
from benchmarks.originals.crema_d import crema_d
from benchmarks.originals.kinetics_sounds import kinetics_sounds
from benchmarks.originals.mosi import cmu_mosi
from benchmarks.originals.ucf101 import ucf101

__all__ = ["ClipData", "av_mnist", "cmu_mosi", "crema_d", "kinetics_sounds", "ucf101"]
