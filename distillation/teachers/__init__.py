"""Where the distributions come from that a student is compared with.

| `teacher:` | what | needs |
|---|---|---|
| `local` | another model in memory | `teacher_model_name_or_path`, or `teacher_model` |
| `start` | the student's own weights before training, frozen | rows with `teacher_prompt` |
| `{name: ema, decay: 0.999}` | the running average of the student's own weights | rows with `teacher_prompt` |
| `{name: cache, path: DIR}` | the top k of every token, as `fdiv teach` wrote them | `on_policy_share: 0` |
| `{name: server, url: …}` | the top k of every token, from a vLLM server over HTTP | the server |

All are `fdiv.distillation.teachers.base.Teacher`; one of your own is named `module:attribute`.
"""

from fdiv.distillation.teachers.base import Encoded, Teacher, build_teacher
from fdiv.distillation.teachers.local import LocalTeacher, load_teacher
from fdiv.distillation.teachers.own import EMATeacher, StartTeacher
from fdiv.distillation.teachers.vocabularies import check_known_tokens, shared_tokens, teacher_tokenizer

__all__ = [
    "EMATeacher",
    "Encoded",
    "LocalTeacher",
    "StartTeacher",
    "Teacher",
    "build_teacher",
    "check_known_tokens",
    "load_teacher",
    "shared_tokens",
    "teacher_tokenizer",
]
