"""The programs that made the results: python -m research.NAME."""
