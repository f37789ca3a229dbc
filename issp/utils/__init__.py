"""What is not about sparsity: files, text, timing, the machine. Imports nothing of issp."""
