"""Samplers for other models, and samplers of one's own: one script each."""
