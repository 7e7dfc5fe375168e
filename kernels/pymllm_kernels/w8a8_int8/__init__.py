"""int8 × int8 GEMM with both scales, the zero-point correction and the bias in its epilogue."""
