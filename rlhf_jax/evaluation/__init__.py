"""What a trained model is worth, each number with its interval."""
