"""Kernels for accelerators, each the schedule of a mathematics that is defined elsewhere; loaded where they are used."""
