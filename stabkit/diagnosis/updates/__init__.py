"""Whether an optimizer's updates are stable on the loss that they are to lower."""
