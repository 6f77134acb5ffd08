"""Defenses: training losses, one paper a file, and the table of their names."""
