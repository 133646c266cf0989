"""What warm-up adapts: step size, trajectory length, scale of the inputs."""
