"""A request to unlearn rows of one's own (`fdiv unlearn`): files in; an adapter and an erasure report out."""
