"""Figures of a policy on held-out items, with intervals and comparisons."""
