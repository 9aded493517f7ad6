"""The data set of the authors, WorldTasks, and folders like it."""
