"""Functions recorded as operations of torch, of which those that are alike run as one."""

from .program import RecordingError
from .record import RecordedFunction, flatten, record

__all__ = ["RecordedFunction", "RecordingError", "flatten", "record"]
