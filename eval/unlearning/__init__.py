"""Unlearning measured on rows of one's own, and under attack (`fdiv.eval.unlearning.attacks`)."""
