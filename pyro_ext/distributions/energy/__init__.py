"""Autoregressive energy machines: densities with a neural energy, one feature at a time."""

from .distribution import EnergyMachineDistribution as EnergyMachineDistribution
from .machine import AutoregressiveEnergyMachine as AutoregressiveEnergyMachine
from .monitor import NormalizerCheck as NormalizerCheck

__all__ = ["AutoregressiveEnergyMachine", "EnergyMachineDistribution", "NormalizerCheck"]
