"""The training pipeline, run from a clone: `accelerate launch --quiet -m train.pretrain --config RECIPE`."""
