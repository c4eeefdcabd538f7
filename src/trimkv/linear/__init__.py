"""Products of few rows with large matrices, and what lies between them in a decoder layer, in few launches."""
