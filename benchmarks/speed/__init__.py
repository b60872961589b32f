"""What one step of the regularizer costs, beside its peers in the same run."""
