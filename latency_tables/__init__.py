"""Measured latency tables as JSON files: data only, read through `profilers.table`."""
