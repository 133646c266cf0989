"""Effect handlers that the inference engines share."""

from .condition_on import condition_on as condition_on
from .frozen import frozen as frozen
from .lift_observations import lift_observations as lift_observations

__all__ = ["condition_on", "frozen", "lift_observations"]
