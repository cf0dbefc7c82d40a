"""What masking does to gradients in training, and to scores on disturbed texts."""
