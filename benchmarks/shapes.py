"""Sizes of models that are measured with random weights, as arguments of their configuration classes."""

from trimkv.bench.shapes import SHAPES

SMOLLM2 = {**SHAPES["smollm2"], "max_position_embeddings": 8192}
SMOLLM2.pop("model_type")
