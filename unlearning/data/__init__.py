"""The rows of an unlearning run: what is read, how it is encoded, and which rows meet in a step.

`rows` reads, `encode` tokenises and batches, `pairing` says which forget, template and retain rows meet, `templates`
gives the answers put in place of the forgotten ones, `assembly` builds it all from a config.
"""

from fdiv.unlearning.data.encode import (
    EncodedAnswer,
    UnlearningCollator,
    check_disjoint,
    encode_answer,
    encode_text,
    render_chat,
)
from fdiv.unlearning.data.pairing import ForgetDataset
from fdiv.unlearning.data.rows import Answer, load_rows, read_answers

__all__ = [
    "Answer",
    "EncodedAnswer",
    "ForgetDataset",
    "UnlearningCollator",
    "check_disjoint",
    "encode_answer",
    "encode_text",
    "load_rows",
    "read_answers",
    "render_chat",
]
