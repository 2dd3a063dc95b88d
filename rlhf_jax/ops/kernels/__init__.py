"""Kernels for accelerators, each the schedule of a mathematics that is defined elsewhere."""
