"""Several ranks, in processes of their own."""
