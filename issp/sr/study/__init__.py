"""Studies: a grid of training runs with equal budgets, scored on test sets, and one report.

plan.py reads the file and lists the runs, runner.py and worker.py train and score them in
processes, report.py writes the tables and the figure.
"""
