"""Weight-only GEMM: int4 or int8 group weights, 16-bit activations, dequantization in the kernel."""
