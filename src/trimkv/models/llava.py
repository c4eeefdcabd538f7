from .absent import VISION

raise ImportError(VISION.format(module=__name__))
