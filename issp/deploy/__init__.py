"""From a trained sparse network to a fast one: measure every layer, choose, replace."""
