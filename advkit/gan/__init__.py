"""Generative adversarial networks: a generator draws, a discriminator tells drawings from data, and they learn from each other.

:mod:`advkit.gan.source` is what the rest of advkit takes: something that draws samples. :mod:`advkit.gan.game` trains one,
:mod:`advkit.gan.score` says what it has learned.
"""
