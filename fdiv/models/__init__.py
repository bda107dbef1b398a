"""Models: log-probabilities, the frozen reference, loading, fingerprints, tiny models."""
