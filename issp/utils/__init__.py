"""What is not about sparsity: files, text, errors, the machine. Imports nothing of issp."""
