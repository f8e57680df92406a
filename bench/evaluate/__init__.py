"""Quality of a trained model: loss, accuracy, use of context, statistics of attention."""
