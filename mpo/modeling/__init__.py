"""Models: opening them, who they are, preference trees, masks, the reward-gap head, the loss."""
