"""Pruning during training: which weights shrink, when, and what is kept of it."""
