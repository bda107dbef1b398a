"""Mathematics: the reward, and in its workers the reading of answers and their comparison."""
