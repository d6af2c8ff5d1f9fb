"""How public checkpoints map onto a MinMo's modules: one file a checkpoint."""
