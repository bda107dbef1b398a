"""The memory plan of a run: counted activations, weights, and where they are placed."""
