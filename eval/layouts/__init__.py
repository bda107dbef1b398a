"""A benchmark as a folder: files of rows and a `benchmark.yaml` that says what they are (`layout`).

    fdiv eval benchmark --model MODEL --data FOLDER --output DIR

TOFU and MUSE are two of them (`tofu.yaml`, `muse.yaml` here); the others here name data sets of the hub.
"""

from fdiv import lazy

__all__ = ["BenchmarkEvalConfig", "Layout", "load_layout"]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "BenchmarkEvalConfig": "fdiv.eval.layouts.evaluation",
        "Layout": "fdiv.eval.layouts.layout",
        "load_layout": "fdiv.eval.layouts.layout",
    },
)
