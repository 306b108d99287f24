"""Where parameters live, and so how a whole matrix's gradient reaches its owner and how the update goes back."""
