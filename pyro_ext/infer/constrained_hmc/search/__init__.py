"""Searching for points on a manifold."""
