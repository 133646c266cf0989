"""A constrained system of numbers: its functions, and the structure that makes them cheap."""
