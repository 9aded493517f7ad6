"""What each verb does: training, evaluation, pretraining and the other whole jobs."""
