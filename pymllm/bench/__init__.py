"""The benchmark harness behind ``pymllm bench`` and ``bench/``.

Importing this package touches neither a GPU nor any of the libraries it compares with.
"""
