"""Effect handlers that the inference engines share."""

from .lift_observations import lift_observations as lift_observations

__all__ = ["lift_observations"]
