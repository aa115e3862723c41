"""For trainers that make a loss of their own out of the model's parts."""

from transformers import Trainer


class ModelLoss:
    """Goes in front of a Trainer that fuses the head with its loss: `class MySFT(ModelLoss, trl.SFTTrainer): pass`.

    TRL's SFTTrainer calls the decoder and multiplies by the head's weight itself, so that what the model's own forward
    adds to the cross-entropy (balance, indexer, multi-token prediction) is in nobody's loss. This takes the loss from
    that forward, as transformers' Trainer does, with the same normalisation over accumulation steps and ranks. Data,
    packing, masks and the rest stay the trainer's; its entropy and token accuracy, by-products of its own loss, are
    not logged.

    Raises: ValueError for settings that would change the loss that this replaces.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if getattr(self.args, "loss_type", "nll") != "nll":
            raise ValueError(
                f"loss_type={self.args.loss_type!r} is not possible with the model's own loss: only 'nll' is."
            )
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} is not possible: that loss is for softmax routers. "
                "The model adds its own by config.aux_loss_alpha."
            )
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
