"""Alignment objectives: f-DPO, f-DPG and D²O."""

if __name__ != "fdiv.alignment":
    raise ImportError("this folder is installed as fdiv.alignment: use `import fdiv.alignment`, not `import alignment`")
