"""Tensor code that knows no Pyro."""
