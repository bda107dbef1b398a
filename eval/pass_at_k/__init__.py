"""Pass@k: unbiased estimates from sampled completions (arXiv:2107.03374)."""
