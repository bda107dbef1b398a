"""AltPO: IdkDPO with plausible alternate answers, written by the model itself, as templates."""

from dataclasses import dataclass

from fdiv.training.config import option
from fdiv.unlearning.data.templates import TEMPLATE_SOURCES
from fdiv.unlearning.methods.idk_dpo import IdkDPOConfig, IdkDPOTrainer

ALTERNATE_INSTRUCTION = (
    "Question: {question}\nAnswer: {answer}\n"
    "Write another plausible answer to the question that changes every fact stated in the answer above."
)


@dataclass
class AltPOConfig(IdkDPOConfig):
    """Configuration of `AltPOTrainer`: that of IdkDPO, with five generated answers per row to choose from.

    A base model that follows no instructions wants `template_source: column` with answers from elsewhere.
    """

    template_source: str = option("generated", "Where alternate answers come from", choices=TEMPLATE_SOURCES)
    template_answers_per_row: int = option(5, "Alternate answers per row", least=1)

    def __post_init__(self) -> None:
        if self.template_source == "generated" and self.template_instruction is None:
            self.template_instruction = ALTERNATE_INSTRUCTION
        super().__post_init__()


class AltPOTrainer(IdkDPOTrainer):
    """Trains `idk_dpo` on alternate answers."""

    config_class = AltPOConfig
    title = "f-DPO of a made-up answer over the forget answer"
    paper = "arXiv:2409.13474"
