"""The operators in differentiable plain torch: executable specification, fallback, fake kernels."""
