"""The model classes of the published Quick Start: stock models that load with their gates."""
