"""Figures from saved results. Reads numbers, never torch; matplotlib comes with the figure that needs it."""
