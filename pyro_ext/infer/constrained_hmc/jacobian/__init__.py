"""Jacobians of one form each: their patterns, products and factorisations."""
