"""All that knows Lightning on one device: callbacks, the strategy, the module, checkpoints."""
