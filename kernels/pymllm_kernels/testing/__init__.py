"""Support for testing kernels: ahead-of-time compilation and checks of the machine code."""
