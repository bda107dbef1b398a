"""What runs inside a sandbox, on the standard library alone: the program's side, the tests' side, and their wire."""
