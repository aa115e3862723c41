"""The training pipeline, run from a clone: `accelerate launch -m train.pretrain --config configuration/recipes/...`."""
