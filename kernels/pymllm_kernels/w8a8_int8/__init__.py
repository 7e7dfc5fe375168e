"""int8 by int8 GEMM with both scales, the zero-point correction and the bias in its epilogue."""
