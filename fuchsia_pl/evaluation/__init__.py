"""Figures of a run: how good the policy is, with intervals, and whether training is in order."""
