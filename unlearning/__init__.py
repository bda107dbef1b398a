"""Unlearning objectives: FLAT and the methods it is compared with."""

if __name__ != "fdiv.unlearning":
    raise ImportError("this folder is installed as fdiv.unlearning: use `import fdiv.unlearning`, not `import unlearning`")
