"""Measuring: timing, ceilings, power, workloads and the records they are kept in."""
