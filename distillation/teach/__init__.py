"""`fdiv teach`: keep the top k of a teacher for every completion token, so that training needs no teacher."""

from fdiv import lazy

__all__ = ["TeachConfig", "teach"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"TeachConfig": "fdiv.distillation.teach.config", "teach": "fdiv.distillation.teach.run"}
)
