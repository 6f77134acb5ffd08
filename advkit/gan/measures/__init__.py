"""What samples tell of a generator, one measure a file, on tensors alone; :mod:`advkit.gan.score` takes them together.

Those of quality and diversity (fid, kid, precision_recall, coverage) compare images in the hidden units of a classifier:
features. Those of copying (birthday, memory) compare pixels, in which a copy is a copy.
"""
