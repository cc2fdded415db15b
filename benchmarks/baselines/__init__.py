"""Networks of others, on the same records with the same budget as AnyECG: importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModelForSequenceClassification

from .net1d import Net1d, Net1dConfig
from .s4d import S4DClassifier, S4DConfig
from .xresnet1d import XResNet1d, XResNet1dConfig

NETWORKS = {
    "xresnet1d101": (XResNet1dConfig, XResNet1d),
    "net1d": (Net1dConfig, Net1d),
    "s4d": (S4DConfig, S4DClassifier),
}

for _config_class, _model_class in NETWORKS.values():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForSequenceClassification.register(_config_class, _model_class, exist_ok=True)
