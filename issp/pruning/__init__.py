"""Pruning during training: `attach`, methods, schedules, masks."""
