"""Tensor code without Pyro: what the engines compute with."""
