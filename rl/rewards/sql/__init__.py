"""SQL: the reward, and in its workers the execution and comparison of queries."""
