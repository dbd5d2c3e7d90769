"""Timed comparisons with the textbook reference and the peers; run them with ``pytest --benchmark``."""
