"""Defenses for recognisers of speech: they act when a sound is heard, and change it first.

They are the transforms of :mod:`advkit.sound`, put in front of a recogniser or of a classifier of sounds. As defenses:

* ``resample`` (downsampling), ``median`` and ``average`` (local smoothing), ``quantise``: Yang, Li, Chen and Song, 2019,
  "Characterizing audio adversarial examples using temporal dependency", https://arxiv.org/abs/1809.10875.
* ``mp3``: Das, Shanbhogue, Chen, Chen, Kounavis and Chau, 2018, "ADAGIO: interactive experimentation with adversarial attack
  and defense for audio", https://arxiv.org/abs/1805.11852.
* ``squeeze``, of the parts of a spectrum that are quiet, in the sense of Xu, Evans and Qi, 2018, "Feature squeezing",
  https://arxiv.org/abs/1704.01155.
* ``noise``, ``reclock`` (resampling at a random rate), ``room``: random transformations, as in Xie, Wang, Zhang, Ren and
  Yuille, 2018, "Mitigating adversarial effects through randomization", https://arxiv.org/abs/1711.01991, for images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from advkit import spec
from advkit.defenses.audio.defended import Defended as Defended
from advkit.defenses.audio.transcripts import Agreeing as Agreeing
from advkit.defenses.audio.transcripts import Transcripts as Transcripts
from advkit.defenses.inference.defended import adaptive as adaptive
from advkit.errors import UsageError
from advkit.sound.air import Sound
from advkit.transforms import SOUNDS

SPEECH_DEFENSES: spec.Table = {
    name: SOUNDS[name] for name in ("resample", "quantise", "mp3", "median", "average", "squeeze", "noise", "reclock", "room")
}
"""The defenses that a spec may name: ``resample(to=8000)``."""


def defend(model: Callable[[Tensor], Any], *defenses: str | Sound, seed: int = 0) -> Defended:
    """A recogniser behind one or more defenses; a sound goes through the first of them first.

    Arguments:
        model: A recogniser, or a classifier of waveforms (N, T).
        defenses: Defenses or their specs, at least one; their rate is the model's.
        seed: Of what they draw.

    Raises:
        UsageError: There is none, or a spec cannot be read.
    """
    if not defenses:
        raise UsageError(f"there is no defense; name at least one of {', '.join(SPEECH_DEFENSES)}")
    for k, defense in enumerate(reversed(defenses)):
        change = spec.parse(defense, SPEECH_DEFENSES, "defense") if isinstance(defense, str) else defense
        model = Defended(change, model, seed + 2 * k)
    assert isinstance(model, Defended)
    return model
