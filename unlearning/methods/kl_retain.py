"""KL-retain: γ·mean log p(y_f) + α·D_f(policy‖reference) on the retain answers' positions, for any f.

TOFU's "KL minimisation" is `retain_divergence: forward_kl`, KL(reference‖policy), here on answer positions only.
"""

from dataclasses import dataclass

from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.methods.grad_ascent import GradAscentTrainer


@dataclass
class KLRetainConfig(UnlearningConfig):
    """Configuration of `KLRetainTrainer`: the shared keys; `retain_divergence` is the f, `forward_kl` by default."""

    retain_term: str = retain_option("divergence", why="With an NLL retain term it is the method grad_diff")


class KLRetainTrainer(GradAscentTrainer):
    """Trains `grad_ascent` with `vocabulary_divergence` or `sampled_divergence` on the retain answers."""

    config_class = KLRetainConfig
    title = "gradient ascent with a divergence from the reference on retain answers"
    paper = "arXiv:2401.06121"
