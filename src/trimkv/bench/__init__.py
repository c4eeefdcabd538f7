"""Measures: systems side by side in one run, each beside the time that the hardware needs at least."""
