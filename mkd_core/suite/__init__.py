"""Around the core, for notebooks and the command: tables, figures, batches, predictions, export, cost."""
