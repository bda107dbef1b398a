"""The benchmark that needs an accelerator: `python -m benchmarks.gpu`."""
