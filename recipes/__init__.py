"""Recipes: one YAML file is one run. Data only; nothing here is imported."""

if __name__ != "fdiv.recipes":
    raise ImportError("this folder is installed as fdiv.recipes: use `import fdiv.recipes`, not `import recipes`")
