"""Recipes: one YAML document read, overridden, checked against its schema, and printed as resolved."""

from fdiv import lazy

__all__ = ["Block", "Configs", "Recipe", "ReportKeys", "RunKeys", "find_recipe", "load_recipe", "packaged_recipes"]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "Block": "fdiv.recipe.model",
        "Configs": "fdiv.recipe.model",
        "Recipe": "fdiv.recipe.model",
        "ReportKeys": "fdiv.recipe.model",
        "RunKeys": "fdiv.recipe.model",
        "find_recipe": "fdiv.recipe.load",
        "load_recipe": "fdiv.recipe.load",
        "packaged_recipes": "fdiv.recipe.load",
    },
)
