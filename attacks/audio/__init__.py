"""Attacks on recognisers of speech, one paper a file."""
