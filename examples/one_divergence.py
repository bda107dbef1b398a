"""One divergence alone, without a trainer: `python examples/one_divergence.py`."""

import torch

from fdiv.divergences import get_divergence, list_divergences

policy = torch.tensor([0.70, 0.20, 0.10]).log()
reference = torch.tensor([0.40, 0.40, 0.20]).log()

# D_f(policy ‖ reference) of two categorical distributions, exactly …
divergence = get_divergence({"name": "alpha", "alpha": 0.3})
exact = divergence.exact(policy, reference)
print(f"{divergence.label}: exact {exact:.4f}")

# … and from samples of the reference, which need only the log-ratios.
samples = torch.multinomial(reference.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
estimate = divergence.estimate((policy - reference)[samples], sampled_from="q")
print(f"{divergence.label}: estimate {estimate.value:.4f} ± {estimate.standard_error:.4f}")

# f', the score that f-DPO compares, of a log-ratio that would overflow exp(-x): finite, with a live gradient.
log_ratio = torch.tensor([-1.0, 0.0, 1.0, -500.0], requires_grad=True)
score = get_divergence("forward_kl").derivative(log_ratio)
score.sum().backward()
print(f"forward_kl f': {score.tolist()}, slope {log_ratio.grad.tolist()}")

# One penalty of the same two distributions under every divergence that needs no parameter.
for name in list_divergences():
    if name not in ("alpha", "skew_jensen_shannon"):
        print(f"{name:>20} {get_divergence(name).exact(policy, reference):.4f}")
