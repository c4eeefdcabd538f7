"""Attention over slots: tensors in, tensors out. Knows no model and no cache."""
