"""Losses and steps of training, and the loops around them."""
