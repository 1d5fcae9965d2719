"""Weights in 16 bits and their 32-bit masters."""
