"""A Pyro model as a constraint and a density of standardised inputs."""
