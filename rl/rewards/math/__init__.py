"""Mathematics: the reward; in its workers where an answer stands, how it is read, and when two are equal."""
