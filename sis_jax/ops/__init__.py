"""Foundations without files or networks: types, array operations, k-means, devices, metrics,
drawing, the command-line door.
"""
