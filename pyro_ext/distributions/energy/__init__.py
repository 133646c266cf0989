"""Autoregressive energy machines: densities with a neural energy, one feature at a time."""

from .distribution import EnergyMachineDistribution as EnergyMachineDistribution
from .kernel_density import KernelDensityAEM as KernelDensityAEM
from .kernel_density import KernelFit as KernelFit
from .machine import AutoregressiveEnergyMachine as AutoregressiveEnergyMachine
from .monitor import NormalizerCheck as NormalizerCheck

__all__ = [
    "AutoregressiveEnergyMachine",
    "EnergyMachineDistribution",
    "KernelDensityAEM",
    "KernelFit",
    "NormalizerCheck",
]
