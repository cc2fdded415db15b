"""Stage two of AnyECG and what all three training commands share: data, collation, masking, the Trainer, metrics.

`anyecg_hf` never imports this package; `tokenization` uses its data and Trainer.
"""
