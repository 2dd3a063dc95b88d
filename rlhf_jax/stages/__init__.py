"""The programs of a run: pretraining, supervised fine-tuning, reward model, PPO, and the evaluation behind them."""
