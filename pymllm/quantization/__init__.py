"""Quantization configurations and the schemes they select."""
