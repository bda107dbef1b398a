"""The inference engine: encoded prompts, batched passes, scoring, greedy decoding, sampling, back ends, caches."""
