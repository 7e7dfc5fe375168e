"""Variants of what we time, each beside what it varies: dtypes, groups, zero points, strides, host costs."""
