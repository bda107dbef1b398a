"""Evaluation: one scoring pass, one generation pass, and the metrics on top of them."""

if __name__ != "fdiv.eval":
    raise ImportError("this folder is installed as fdiv.eval: use `import fdiv.eval`, not `import eval`")
