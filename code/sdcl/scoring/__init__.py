"""What becomes of predictions: scores, tables, figures, reports."""
