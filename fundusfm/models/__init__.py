"""Towers, heads and weights: plain modules that know nothing of data, ranks or training."""
