"""Data: where examples come from, how they become arrays, and which of them a training step sees."""
