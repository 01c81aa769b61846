"""Student surgery: pure functions from a model to a smaller one."""
