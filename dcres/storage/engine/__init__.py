"""Bytes: pages read, summed, placed and written in large pieces."""
