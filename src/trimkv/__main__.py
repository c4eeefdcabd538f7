"""``python -m trimkv``, which launchers such as ``torchrun -m trimkv train`` need."""

from .cli import main

if __name__ == "__main__":
    main()
