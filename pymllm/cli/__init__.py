"""The ``pymllm`` command: see :mod:`pymllm.cli.main`."""
