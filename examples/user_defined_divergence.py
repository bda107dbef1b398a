"""A divergence of your own from f alone: `python examples/user_defined_divergence.py`.

f is written as a torch function of log t; derivative, conjugate and inverse follow by autograd and root-finding.
Registered, it has a name that every objective and recipe accepts.
"""

import torch

from fdiv.alignment import f_dpo_loss
from fdiv.divergences import Divergence, get_divergence, register_divergence

# The symmetric mean of the two KLs: f(t) = ½ t log t − ½ log t, which is half of `jeffreys`.
register_divergence(Divergence.from_generator("mean_kl", lambda x: 0.5 * (x.exp() * x - x)))
mine, half_jeffreys = get_divergence("mean_kl"), get_divergence("jeffreys").scaled(0.5)

log_ratio = torch.linspace(-3, 3, 7)
torch.testing.assert_close(mine.generator(log_ratio), half_jeffreys.generator(log_ratio))
torch.testing.assert_close(mine.derivative(log_ratio), half_jeffreys.derivative(log_ratio))
print(f"curvature {mine.curvature:.3f}, f'(0+) = {mine.derivative_at_zero}, f'(inf) = {mine.slope_at_infinity}")

# f'(0+) = -inf, so f-DPO may use it; total variation, say, is refused with the reason.
chosen, rejected = torch.tensor([0.5, -1.0]), torch.tensor([-0.5, 0.2])
print("f-DPO loss:", f_dpo_loss(chosen, rejected, "mean_kl", beta=0.1).tolist())
try:
    f_dpo_loss(chosen, rejected, "total_variation", beta=0.1)
except ValueError as error:
    print("refused:", str(error).split(":")[0])
