"""SQL tasks: Chinook and BIRD."""
