"""Activations in the order of a weight's columns (act-order)."""
