"""Many requests on one model: rows of a fixed batch, each with its fixed number of slots."""
