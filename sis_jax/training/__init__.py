"""Losses and steps of training, and the one loop around them."""
