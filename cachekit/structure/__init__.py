"""What a model looks like: its chains and sites, found in one forward on fake tensors."""
