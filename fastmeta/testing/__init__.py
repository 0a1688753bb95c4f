"""What tests and benchmarks share: the operator table, samples, tolerances, float64 helpers."""
