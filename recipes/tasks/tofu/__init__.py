"""Tasks from TOFU rows."""
