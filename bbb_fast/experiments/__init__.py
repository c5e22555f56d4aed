"""What the command line runs: data, training, checkpoints, judging, figures. Nothing else imports it."""
