"""Waveforms: files, threat models in decibels, features.

A batch of sounds is (N, T), float, in [-1, 1], at one sample rate. Shorter sounds end in digital silence (exact zeros):
nothing that advkit does hears trailing zeros or changes them, so no answer depends on how long the rest of a batch is.
"""
