"""The other programs: python -m tools.NAME."""
