"""What the backbone is pretrained on; one objective a file.

| name | file | ends as |
|---|---|---|
| masked_codes (the paper) | `masked_codes.py` | `AnyECGForMaskedCodeModeling` |
| masked_waveform | `masked_waveform.py` | `AnyECGForLeadReconstruction` |
| contrastive (ECG-FM) | `contrastive.py` | `AnyECGModel` |
| latents (JEPA) | `latents.py` | `AnyECGModel` |
"""

from .base import Objective
from .contrastive import Contrastive
from .latents import LatentPrediction
from .masked_codes import CodeBaselines, MaskedCodes
from .masked_waveform import MaskedWaveform

__all__ = ["CodeBaselines", "Contrastive", "LatentPrediction", "MaskedCodes", "MaskedWaveform", "Objective"]
