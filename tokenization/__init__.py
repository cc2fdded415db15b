"""Stage one of AnyECG: the rhythm quantizer, its training and the health of its codebook.

The quantizer itself lives in `anyecg_hf`, because a checkpoint can carry files of one folder only.
"""

from anyecg_hf.configuration_anyecg import AnyECGQuantizerConfig
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

__all__ = ["AnyECGQuantizerConfig", "AnyECGRhythmQuantizer"]
