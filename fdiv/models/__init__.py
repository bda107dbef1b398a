"""Models: where they come from, loading, log-probabilities, the frozen reference, fingerprints, tiny models."""
