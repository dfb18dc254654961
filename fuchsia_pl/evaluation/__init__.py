"""Figures of a run: how good the policy is, and whether training is in order."""
