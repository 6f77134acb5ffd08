"""Defenses for recognisers of speech."""
