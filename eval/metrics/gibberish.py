"""The gibberish classifier open-unlearning reports as fluency: probability that a generation is clean text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fdiv.errors import DataError
from fdiv.inference.processes import process_state, whole_models

__all__ = ["CLASSIFIER", "clean_text_probability"]

CLASSIFIER = "madhurjindal/autonlp-Gibberish-Detector-492513457"


@torch.no_grad()
def clean_text_probability(
    texts: Sequence[str], classifier: str = "auto", *, batch_size: int = 32, max_length: int = 32, class_id: int = 0
) -> list[float]:
    """Probability of the class `clean` for every text.

    Args:
        texts: generations.
        classifier: `auto` takes `CLASSIFIER` if it lies in the local hub cache and downloads nothing; a path or hub
            name is loaded as such.
        batch_size: rows of a forward.
        max_length: tokens kept of each text (32 in open-unlearning's TOFU evaluation, 512 in its MUSE evaluation).
        class_id: the classifier's class for clean text.
    Raises:
        DataError: the classifier is not available; the message is the reason a result gives.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name, local = (CLASSIFIER, True) if classifier == "auto" else (classifier, False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        with whole_models():
            model = AutoModelForSequenceClassification.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError) as error:
        hint = f"; --fluency_classifier {CLASSIFIER} downloads it" if local else f": {str(error).splitlines()[0]}"
        raise DataError(f"the gibberish classifier {name} is not available here{hint}") from None
    device = process_state().device
    model.to(device).eval()
    scores: list[float] = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(device)
        scores += model(**batch).logits.float().softmax(-1)[:, class_id].tolist()
    return scores
