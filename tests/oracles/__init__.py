"""What the operators and the model are checked against."""
