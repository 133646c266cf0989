"""Trajectories on a manifold: projections, steps, transitions."""
