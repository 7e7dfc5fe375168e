"""Quantization of activations to int8: a scale a row found at run time, or one given scale."""
